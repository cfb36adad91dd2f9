"""The command from its options to its table, with systems that answer from `generate`, rightly or wrongly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest.bench.__main__ import Start, main
from loadtest.bench.peers.generator import Generator
from loadtest.bench.scenario import Request
from loadtest.bench.systems import Round, System
from loadtest.bench.worker import Worker
from tests.loadtest.bench.conftest import small_checkpoint


class Peer:
    """`slow_s` on top of what it takes. `wrong`: its last token is another."""

    def __init__(self, name: str, folder: Path, dtype: str, *, slow_s: float, wrong: bool) -> None:
        self.name, self._slow_s, self._wrong = name, slow_s, wrong
        self._generator = Generator(folder, dtype)
        self.running = True

    def run(self, requests: Sequence[Request]) -> Round:
        begin_s = time.perf_counter()
        asked = [self._generator.question_about(r.input_ids, r.pictures, r.max_tokens) for r in requests]
        tokens = self._generator.answer(asked)
        if self._wrong:
            tokens[-1][-1] = tokens[-1][-1] % 7000 + 300
        time.sleep(self._slow_s)
        return Round(time.perf_counter() - begin_s, tokens, client_cpu_s=0.001)

    def stop(self) -> None:
        self.running = False


def starting(peers: list[Peer], **wrong: bool) -> Start:
    def start(names: Sequence[str], folder: Path, dtype: str, users: Worker) -> list[System]:
        started = [
            Peer(name, folder, dtype, slow_s=0.0 if name == "service" else 1.0, wrong=wrong.get(name, False))
            for name in names
        ]
        peers.extend(started)
        return list(started)

    return start


def test_a_short_run_prints_a_table_and_stops_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peers: list[Peer] = []
    record = tmp_path / "results.json"
    arguments = ["--short", "--systems", "service,fastapi", "--record", str(record)]
    assert main(arguments, starting(peers), lambda folder: small_checkpoint(folder / "small")) == 0
    table = capsys.readouterr().out
    for scenario in ("1 user, 1 picture", "8 users, 1 picture, repeated"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {scenario} | float32")]
        assert float(row.split("|")[8]) > 1.5, "the peer that sleeps is slower"
        assert row.endswith("| 100 % |")
    assert peers and not any(peer.running for peer in peers)
    assert main(["--show", "--record", str(record)]) == 0
    assert "| 8 users, 1 picture, repeated | float32 |" in capsys.readouterr().out


def test_a_wrong_token_ends_the_run_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    peers: list[Peer] = []
    arguments = ["--short", "--only", "1 user, 1 picture", "--systems", "service,fastapi"]
    status = main(arguments, starting(peers, fastapi=True), lambda folder: small_checkpoint(folder / "small"))
    assert status == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("crossgate: fastapi gives other tokens than the reference; user 0: token 15 is ")
    assert not any(peer.running for peer in peers)


def test_in_half_precision_the_table_says_what_share_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--short", "--only", "1 user, 1 picture", "--systems", "service", "--dtype", "bfloat16"]
    assert main(arguments, starting([], service=True), lambda folder: small_checkpoint(folder / "small")) == 0
    agreed = capsys.readouterr().out.splitlines()[-3].split("|")[-2]
    assert 50 < float(agreed.strip(" %")) < 100


@pytest.mark.parametrize("arguments", [["--systems", "vllm"], ["--short", "--write"], ["--rounds", "0"], ["--show"]])
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2


def test_a_scenario_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(SystemExit, match="no scenario's name has 'nine users'"):
        main(["--only", "nine users"], starting([]), lambda folder: folder)
