"""Settings of the endpoint."""

import dataclasses

from keras_gemma_ft.config.fields import at_least, setting, that


@dataclasses.dataclass(frozen=True)
class Serve:
    """The endpoint: where it listens, and how much it takes at once."""

    host: str = setting(
        "127.0.0.1",
        "address to listen at; any other than this one lets other machines "
        "in, and nobody is asked for a password",
        expect=that(str.strip, "it is empty; this machine is 127.0.0.1."),
    )
    port: int = setting(
        8000,
        "port to listen at; 0 is any that is free",
        expect=that(lambda value: 0 <= value < 65536, "expected 0 to 65535."),
    )
    context: int = setting(
        4096,
        "most tokens of a prompt and its answer together",
        expect=at_least(2),
    )
    queue: int = setting(
        16,
        "requests that may wait; further ones are sent away",
        expect=at_least(1),
    )
