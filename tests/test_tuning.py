"""Which blocks a matrix gets on a GPU: from a table, or measured once. Timers stand in for the GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from triton_process import collect, needs_triton


@needs_triton
def test_tuning(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1")


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.function.__name__.startswith("interpreted_"):
        from riverinfer.kernels import linear_launch

        monkeypatch.setattr(linear_launch, "measured", {})


def interpreted_the_fastest_for_both_kinds_is_taken_and_kept(tmp_path: Path) -> None:
    from riverinfer.kernels.linear_launch import Config, config_for
    from riverinfer.kernels.triton_tuning import candidates, file_name, prepare

    shape, asked = (2048, 4096), list[Config]()
    tried = candidates(*shape)
    assert len(tried) > 3
    wanted = tried[-1]

    def timer(of: tuple[int, int], config: Config) -> tuple[float, float]:
        assert of == shape
        asked.append(config)
        if config == tried[0]:
            return 1.0, 3.0  # the fastest of one kind alone
        if config == tried[1]:
            raise RuntimeError("out of shared memory")
        return (1.1, 1.0) if config == wanted else (2.0, 2.0)

    prepare([shape, shape], "GPU 1/2", tmp_path, timer)
    assert asked == tried
    assert config_for(*shape) == wanted
    asked.clear()
    prepare([shape], "GPU 1/2", tmp_path, timer)
    assert asked == []
    prepare([shape], "GPU 2", tmp_path, timer)
    assert len(asked) == len(tried)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["GPU_1_2.json", "GPU_2.json"]
    for damage in ("", "[]", '{"2048": {}}', '{"2048x4096": {"blocks": 1}}', '{"2048x4096": 1}'):
        (tmp_path / file_name("GPU 2")).write_text(damage)
        asked.clear()
        prepare([shape], "GPU 2", tmp_path, timer)
        assert len(asked) == len(tried)
        assert json.loads((tmp_path / "GPU_2.json").read_text()).keys() == {"2048x4096"}


def interpreted_a_shipped_table_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from riverinfer.kernels import triton_tuning
    from riverinfer.kernels.linear_launch import Config, config_for

    (tmp_path / "GPU.json").write_text('{"64x512": {"block_n": 32, "split": 2}}')
    monkeypatch.setattr(triton_tuning, "SHIPPED", tmp_path)

    def timer(*_: object) -> tuple[float, float]:
        raise AssertionError("nothing is to be measured")

    triton_tuning.prepare([(64, 512)], "GPU", tmp_path / "cache", timer)
    assert config_for(64, 512) == Config(block_n=32, split=2)
    assert not (tmp_path / "cache").exists()


def interpreted_nowhere_to_keep_it(tmp_path: Path) -> None:
    from riverinfer.kernels.linear_launch import config_for
    from riverinfer.kernels.triton_tuning import candidates, prepare

    (tmp_path / "file").write_text("")
    prepare([(64, 512)], "GPU", tmp_path / "file", lambda *_: (1.0, 1.0))
    assert config_for(64, 512) == candidates(64, 512)[0]
