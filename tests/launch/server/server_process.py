"""A real `tp-mamba serve` for tests: started once, asked by many."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import httpx
import openai
import torch

from tp_mamba import MambaForCausalLM, SamplingParams, load_tokenizer

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "shakespeare-mamba-hf"
MODEL = "shakespeare"
KEY = "a key of tests"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TIMEOUT_S = 120.0


class ServerProcess:
    """One server over ``size`` ranks on the CPU, in a process group of its own."""

    def __init__(self, folder: Path, size: int, *arguments: str, key: str | None = KEY) -> None:
        """Start it and wait until it takes requests."""
        command = [sys.executable, "-P", "-m", "tp_mamba.launch", "serve", str(folder), "--tp", str(size)]
        command += ["--port", "0", "--device", "cpu", "--dtype", "float32", "--json", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TP_MAMBA_API_KEY", None)
        if key is not None:
            environment["TP_MAMBA_API_KEY"] = key
        self.size, self.key = size, key
        self.log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  (for as long as the server lives)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
            env=environment,
        )
        try:
            assert self.process.stdout is not None
            self.report = _read_object(self.process.stdout)
        except BaseException:
            self.kill()
            raise AssertionError(f"the server did not start: {self.errors()}") from None
        self.url: str = self.report["url"]

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def errors(self) -> str:
        """What it has said on stderr."""
        self.log.flush()
        return Path(self.log.name).read_text()

    def openai(self, **options: object) -> openai.OpenAI:
        """OpenAI's client, asking this server."""
        options = {"api_key": self.key or "none", "max_retries": 0, "timeout": TIMEOUT_S, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)  # type: ignore[arg-type]

    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=TIMEOUT_S)

    @property
    def headers(self) -> dict[str, str]:
        """Those with the key."""
        return {"Authorization": f"Bearer {self.key}"}

    def metrics(self) -> dict[str, float]:
        """The numbers of `/metrics` by name."""
        text = httpx.get(f"{self.url}/metrics", timeout=TIMEOUT_S).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("tp_mamba_"): float(value) for name, value in lines}

    def ranks(self) -> list[int]:
        """Process ids of its ranks, in order; of itself, where it is the only one."""
        if self.size == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def kill(self) -> None:
        """End all of it."""
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _read_object(stream: IO[str]) -> dict[str, object]:
    lines = []
    for line in stream:
        lines.append(line)
        if re.fullmatch(r"}\s*", line):
            return json.loads("".join(lines))  # type: ignore[no-any-return]
    raise ValueError("no object")


class Oracle:
    """The same model without a server."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.model = MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def text(self, prompt: str, tokens: int, **options: object) -> str:
        """Its continuation of ``prompt``, alone."""
        ids = self.tokenizer.encode(prompt).ids
        params = SamplingParams(max_new_tokens=tokens, **options)  # type: ignore[arg-type]
        text = self.model.generate([ids], params, tokenizer=self.tokenizer)[0].text
        assert text is not None
        return text
