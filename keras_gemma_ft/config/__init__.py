"""Every setting, declared once, as a field of a frozen dataclass.

A field is made with `setting(default, help)`; `command_line` makes its flag
from its path: `Config.lora.rank` is `--lora.rank=16`. What a setting refuses
stands beside it, what several refuse together in `settings.CONFLICTS`.
"""

from keras_gemma_ft.config import exporting
from keras_gemma_ft.config.answers import Generate
from keras_gemma_ft.config.data import Data
from keras_gemma_ft.config.exporting import FORMATS, Export
from keras_gemma_ft.config.fields import (
    UserError,
    did_you_mean,
    expected,
    flatten,
    replace,
    setting,
    typed,
    walk,
)
from keras_gemma_ft.config.machine import Hosts, Model
from keras_gemma_ft.config.serving import Serve
from keras_gemma_ft.config.settings import (
    BACKENDS,
    EMBEDDED_PRESET,
    Config,
    check,
)
from keras_gemma_ft.config.tuning import OPTIMIZERS, Lora, Train
from keras_gemma_ft.config.verbs import VERBS
from keras_gemma_ft.config.words import (
    PEFT_NAMES,
    TARGET_GROUPS,
    TARGETS,
    cache_folder,
    duration,
    mesh,
    preset_hint,
    roles,
    seconds,
    targets,
)
