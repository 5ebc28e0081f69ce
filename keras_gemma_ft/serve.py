"""Try a tuned model through an endpoint that speaks OpenAI's HTTP API.

python -m keras_gemma_ft.serve --adapter=runs/default
python -m keras_gemma_ft.serve --adapter=runs/a,runs/b --serve.port=9000

Any client of OpenAI's then asks http://127.0.0.1:8000/v1, with any key. The
model in a request is an adapter's name, or the base's. One answer at a time:
for many users, take vLLM or llama.cpp.
"""

from keras_gemma_ft import config, runtime


def serve(cfg):
    """Returns what was served: requests, tokens, the milliseconds of a switch.

    Ends with SIGTERM or Ctrl-C.
    """
    from keras_gemma_ft.serving import listening

    listening.check()
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft import workers
    from keras_gemma_ft.inference import chat, switching
    from keras_gemma_ft.model import hosts
    from keras_gemma_ft.serving import server

    workers.say_one(cfg, backend)
    hosts.start(cfg)
    if hosts.many():
        raise config.UserError(
            "serve is one process; --hosts are for train. Drop them."
        )
    # A port that is taken should not cost the minutes of loading.
    listener = listening.bind(cfg.serve)
    session = chat.of_several(switching.load(cfg), cfg, few=True)
    return server.run(session, cfg, listener)


if __name__ == "__main__":
    runtime.main(serve, __doc__)
