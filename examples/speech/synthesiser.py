"""eSpeak NG, the speech synthesiser, called in this process through the C library of the package `espeakng-loader`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

SYNCHRONOUS = 2  # of espeak_AUDIO_OUTPUT: sound goes to the callback, before espeak_Synth returns
SPEED, PITCH = 1, 3  # of espeak_PARAMETER: words a minute, and 0 to 100
UTF8 = 1
STAY = 1 << 15  # do not end the process where the data are not found
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesiser:
    """The library keeps state of its own: what it says hangs a little on what it said before. A process has one."""

    def __init__(self) -> None:
        import espeakng_loader

        self.data = Path(espeakng_loader.get_data_path())
        self.engine: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = int(self.engine.espeak_Initialize(SYNCHRONOUS, 0, str(self.data).encode(), STAY))
        if self.rate <= 0:
            raise OSError(f"eSpeak NG does not start with its data in {self.data}")
        self.spoken: list[bytes] = []
        self.callback = Callback(self.keep)  # the library holds no reference
        self.engine.espeak_SetSynthCallback(self.callback)

    def keep(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self.spoken.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def say(self, text: str, accent: str, speaker: str, speed: int, pitch: int) -> torch.Tensor:
        """Samples in [-1, 1] of a text, as a speaker (one of eSpeak's variants) with an accent says it."""
        if not (self.data / "voices" / "!v" / speaker).is_file():
            raise OSError(f"this eSpeak NG has no speaker {speaker}")  # it would take another without a word
        if self.engine.espeak_SetVoiceByName(f"{accent}+{speaker}".encode()):
            raise OSError(f"this eSpeak NG has no accent {accent}")
        self.engine.espeak_SetParameter(SPEED, speed, 0)
        self.engine.espeak_SetParameter(PITCH, pitch, 0)
        self.spoken.clear()
        said = text.encode()
        self.engine.espeak_Synth(said, len(said) + 1, 0, 1, 0, UTF8, None, None)
        self.engine.espeak_Synchronize()
        return torch.frombuffer(bytearray(b"".join(self.spoken)), dtype=torch.int16).float() / 2**15


synthesiser = functools.cache(Synthesiser)
