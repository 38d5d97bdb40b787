"""The benchmark works: each script at its smallest, nothing is timed. Ours and the peers have the
same weights.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import InputError
from experiments.speed import (
    chain,
    cost,
    finetuning,
    generation,
    llama2c,
    measuring,
    page,
    peers,
    ppo_iteration,
    preferences,
    sizes,
    training,
)
from experiments.speed.measuring import Case, Row, Settings, Time
from reward import RewardModel

KINDS = (training, preferences, finetuning, generation, llama2c, ppo_iteration)
TINY = Settings(repeats=1, tiny=True)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """The machine's own speed takes seconds to measure, as does tidying up before each run."""
    monkeypatch.setattr(measuring, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(measuring, "matmul_speed", lambda dtype=torch.float32: 1e9)
    monkeypatch.setattr(measuring, "reading_speed", lambda: 1e9)


def fake_row(**changes) -> Row:
    row = Row(
        kind="Work",
        name="S, float32",
        unit="tokens",
        amount=100,
        peer="transformers",
        skipped="",
        target=1.5,
        dtype="float32",
        ours=[Time(1.0, 2.0), Time(2.0, 2.0), Time(1.0, 1.0)],
        theirs=[Time(2.0, 2.0), Time(2.0, 2.0), Time(4.0, 4.0)],
        share=0.5,
        share_of="matmul",
    )
    return replace(row, **changes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.split(".")[-1])
def test_each_kind_of_work_runs(kind, monkeypatch):
    """TRL's trainers take long to start: they are left out even where they are there."""
    missing = peers.missing
    without_trl = lambda *names: "left out" if "trl" in names else missing(*names)  # noqa: E731
    monkeypatch.setattr(peers, "missing", without_trl)
    rows = list(measuring.run_cases(kind.cases(TINY), TINY))
    assert rows
    for row in rows:
        assert len(row.ours) == 1 and row.speed > 0, row
        assert bool(row.theirs) != bool(row.skipped), row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_have_our_weights(dtype):
    pytest.importorskip("transformers")
    model = sizes.T.model(dtype)
    theirs = peers.llama(model)
    tokens = torch.randint(3, model.args.vocab_size, (2, 9))
    with torch.inference_mode():
        ours = model(tokens)
        found = theirs(input_ids=tokens).logits.float()
    close = {torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(found, ours, atol=close, rtol=close)


def test_peers_score_as_our_reward_model():
    pytest.importorskip("transformers")
    model = RewardModel(sizes.T.model())
    theirs = peers.scorer(model.body, model.head.weight.detach())
    tokens = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]])  # 0 is padding
    with torch.inference_mode():
        ours = model(tokens, torch.tensor([4, 3]))
        found = theirs(input_ids=tokens, attention_mask=tokens != 0).logits[:, 0]
    torch.testing.assert_close(found, ours)


def test_both_sample_all_tokens():
    """So many new tokens in each answer, whatever they are."""
    model = sizes.T.model()
    ids = [[1, 5, 6], [1, 7, 8]]
    assert [len(answer) for answer in generation.sample_ours(model, ids, 2, 6, 0.9)] == [6] * 4
    pytest.importorskip("transformers")
    sampled = generation.sample_theirs(peers.llama(model), ids, 2, 6, 0.9)
    assert sampled.shape == (4, 6)


def test_both_losses_are_equal():
    """The mean over the same tokens."""
    pytest.importorskip("transformers")
    model = sizes.T.model()
    tokens = torch.randint(3, model.args.vocab_size, (2, 8))
    dialogs = [training.EncodedDialog(row, [True] * 8, [0] * 8) for row in tokens.tolist()]
    total, count = training.answer_loss(model, dialogs)
    theirs = peers.llama(model)(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(theirs, total / count)


def test_missing():
    assert peers.missing("torch") == ""
    assert peers.missing("torch", "no_such_package") == "no_such_package is not installed"
    assert peers.missing("no_such_package.part") == "no_such_package.part is not installed"


# ---- taking times ----


def test_run_case_takes_turns():
    """Both warm up; then who begins changes; without a peer ours runs alone."""
    order = []

    def note(name: str) -> Time:
        order.append(name)
        return Time(1.0 if name == "ours" else 3.0, 1.0)

    case = Case("Work", "S", "tokens", 10, lambda: note("ours"), lambda: note("theirs"), "them")
    row = measuring.run_case(replace(case, flops=1e9), repeats=2)
    assert order == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]
    assert (row.ratio, row.speed, row.share, row.share_of) == (3.0, 10.0, 1.0, "matmul")
    row = measuring.run_case(replace(case, theirs=None, skipped="gone", bytes_read=5e8), 2)
    assert (row.ratio, row.peer_speed, row.share, row.share_of) == (None, None, 0.5, "reading")
    assert len(measuring.run_case(replace(case, most_repeats=1), 2).ours) == 1


def test_time_steps(monkeypatch):
    """From the end of the first step on; the first is taken to last as long as the others."""
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(measuring, "now", lambda: Time(next(seconds), 0.0))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    def train() -> None:
        for _ in range(6):
            optimizer.step()

    assert measuring.time_steps(train).cpu == 12.0
    assert measuring.time_steps(train, updates=2).cpu == 12.0
    optimizer.step()  # nobody listens any more
    assert next(seconds) == 24


def test_row():
    """The ratio is the median over repeats, and all of it survives JSON."""
    row = fake_row()
    assert row.ratios() == [2.0, 1.0, 4.0] and row.ratio == 2.0
    assert (row.speed, row.peer_speed) == (100.0, 50.0)
    written = row.to_json()
    assert written["wall_ratio"] == 1.0
    assert Row.from_json(json.loads(json.dumps(written))) == row
    shown = measuring.cells(row)
    assert shown[1:] == ["100 tokens/s", "transformers: 50", "2.00", "1.00, 4.00", "1.5"] + [
        "50% of matmul"
    ]
    alone = measuring.cells(fake_row(theirs=[], skipped="gone", share=None, target=None))
    assert alone[2:] == ["transformers: gone", "", "", "", ""]


def test_flops():
    """Of one layer and one token: each number of a matrix is multiplied and added once."""
    args = replace(sizes.T.args, n_layers=1, vocab_size=10)
    model = sizes.Size("one", args).model()
    matrices = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    attention = 4 * args.dim  # one query, one key
    assert sizes.flops(args, [1], 0) == 2 * matrices + attention
    assert sizes.flops(args, [1], 1) - sizes.flops(args, [1], 0) == 2 * 10 * args.dim
    assert sizes.weight_bytes(args, torch.float32) == 4 * (matrices + 10 * args.dim)


def test_shown():
    numbers = (1234567.0, 999.6, 100.0, 12.345, 0.01234)
    shown = ["1,230,000", "1,000", "100", "12.3", "0.0123"]
    assert [measuring.shown(number) for number in numbers] == shown


# ---- what is made of them ----


def test_section():
    rows = [fake_row(), fake_row(name="M", target=3.0), fake_row(theirs=[], skipped="gone")]
    machine = {
        "processor": "a processor",
        "cores": 2,
        "threads": 1,
        "python": "3",
        "versions": {"torch": "2"},
        "matmul": {"float32": 5e10},
        "reading": 1e10,
    }
    result = {"machine": machine, "rows": [row.to_json() for row in rows], "cost": []}
    text = page.page(result)
    assert "In 2 of 2 comparisons we are faster than the peer; 1 of 2 targets are reached." in text
    assert "| matrix products, float32 | 50.0 GFLOP/s |" in text
    assert "transformers: gone" in text and "speed.png" not in text
    result["cost"] = [{}]
    assert "(../experiments/results/speed.png)" in page.page(result)


def test_cost(tmp_path):
    """A point of each kind, then the picture."""
    rows = []
    for axis, values in cost.TINY_AXES.items():
        for value in values:
            for work in cost.WORK:
                point = replace(cost.Point(32, 8, 2), **{axis: value})
                found = {"microseconds": 1.0, "megabytes": 2.0}
                if axis == "dim":
                    found = cost.measure(point, work)
                    assert found["microseconds"] > 0 and found["parameters"] > 0
                rows.append({"axis": axis, "work": work, **vars(point), **found})
    cost.draw(rows, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def fake_checkout(folder: Path, last_words: str = "") -> Path:
    """A checkout whose stages do nothing but write where they ran."""
    folder.mkdir()
    for stage in chain.STAGES:
        program = "import sys; open('ran', 'a').write(' '.join(sys.argv) + '\\n')"
        if last_words:
            program += f"; sys.exit('{last_words}')"
        (folder / f"{stage}.py").write_text(program)
    return folder


def test_chain(tmp_path, capsys):
    old = fake_checkout(tmp_path / "old")
    new = fake_checkout(tmp_path / "new")
    chain.main([str(old), str(new), "--repeats", "2"])
    printed = capsys.readouterr().out
    assert "0 sft old" in printed and "the whole chain" in printed
    ran = (old / "ran").read_text().splitlines()
    assert [line.split()[0] for line in ran] == [f"{stage}.py" for stage in chain.STAGES] * 2
    assert "--threads 1" in ran[0] and ran[0] != ran[len(chain.STAGES)]  # another seed
    broken = fake_checkout(tmp_path / "broken", "no space left")
    with pytest.raises(InputError, match="sft.py failed: no space left"):
        chain.main([str(broken), str(new)])
    with pytest.raises(InputError, match="no checkout there"):
        chain.main([str(tmp_path), str(new)])


def test_chain_table():
    """What is saved is compared repeat by repeat."""
    old = [chain.Spent(10.0, 9.0), chain.Spent(20.0, 9.0)]
    new = [chain.Spent(5.0, 3.0), chain.Spent(15.0, 4.0)]
    times = {stage: {"old": old, "new": new} for stage in chain.STAGES}
    rows = chain.table(times).rows
    assert rows[0] == [chain.STAGES[0], "15.0", "10.0", "38%", "25%, 50%", "3.5"]
    count = len(chain.STAGES)
    assert rows[-1][:3] == ["the whole chain", f"{15 * count:.1f}", f"{10 * count:.1f}"]


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX call tells CPU seconds")
def test_run_stage_counts_cpu_seconds(tmp_path):
    checkout = fake_checkout(tmp_path / "checkout")
    spent = chain.run_stage(checkout, "sft", tmp_path / "out", 0, "toy")
    assert 0 < spent.cpu < 20 and spent.wall > 0
