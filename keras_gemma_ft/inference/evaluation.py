"""How well a model answers: exact match over prompts with references."""


def exact_match(generator, prompts, *, limit):
    """Answers prompts and compares, white space at the ends aside.

    Args:
        generator: `sampling.Generator`; greedy is what makes sense here.
        prompts: `data.pipeline.Prompt`s (prompt_ids, reference).
        limit: longest answer, in tokens.

    Returns:
        (share of prompts answered exactly, the answers as text).
    """
    if not prompts:
        return None, []
    outputs = generator.complete([p.prompt_ids for p in prompts], limit=limit)
    answers = [generator.tokenizer.decode(ids) for ids in outputs]
    right = sum(
        answer.strip() == prompt.reference.strip()
        for answer, prompt in zip(answers, prompts)
    )
    return right / len(prompts), answers
