"""A whole Gemma 2 on disk, whatever its format: its sizes and its variables.

A reader of a format is an object with

    backbone    dict: the arguments of KerasHub's `GemmaBackbone`, and
                `query_pre_attn_scalar` (query scale = that ** -0.5)
    paths       list of the Keras paths of its variables, in the model's order
    read(path)  one variable as an array with Keras's shape, float16, bfloat16
                or float32 as stored (float32 where it is stored in codes)

Nothing but one variable is in memory at a time.
"""
