"""The pages of the examples are those that their committed tables make; what they compute is what they say."""

from __future__ import annotations

import argparse
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from evidence.tables import load

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "examples"


def the_page_is_made_from_the_tables(name: str) -> None:
    example, shared = (importlib.import_module(f"examples.{module}") for module in (name, "shared"))
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    tables = {part: load(PAGES / f"{name}-{part}.csv") for part in example.PARTS}
    assert shared.written(name, tables, example.page) == text
    assert (PAGES / f"{name}.png").exists()


@pytest.mark.parametrize(
    "name",
    ["triple_detection", "three_modalities", "drop_in", "noisy_triples", "two_hops", "what_followed", "language_model"],
)
@pytest.mark.libraries("torch")
def test_the_page_of_layers_is_made_from_the_tables(name: str) -> None:
    pytest.importorskip("torch")
    the_page_is_made_from_the_tables(name)


def test_the_page_of_sums_is_made_from_the_tables() -> None:
    the_page_is_made_from_the_tables("sphere_triplets")


def test_sums_over_triangles_keep_the_stated_error() -> None:
    from examples import sphere_triplets as example

    x, weights = example.points(300, np.random.default_rng(3))
    triangles = example.directly(x, weights)
    np.testing.assert_allclose(example.by_harmonics(x, weights), triangles, rtol=1e-12)
    normaliser = example.directly(x, np.ones(300))
    for tol in example.TOLERANCES[:2]:
        found = example.by_tensor_attention(x, weights, tol)
        error = np.abs(found.mean - triangles / normaliser).max() / weights.max() ** 2
        assert error <= found.error <= tol
        np.testing.assert_allclose(found.lse, np.log(normaliser), atol=-np.log1p(-found.error))


@pytest.mark.libraries("torch")
def test_triples_are_labelled_as_they_are_found_one_by_one() -> None:
    torch = pytest.importorskip("torch")
    from examples import noisy_triples as example

    readings, wanted = example.Task(4000).batch(2, torch.Generator().manual_seed(0))
    for row, labels in zip(readings, wanted, strict=True):
        # Hidden numbers come more often than others by far.
        hidden = torch.bincount(row, minlength=example.MODULUS).numpy() > 200
        found = [
            any(hidden[x] and hidden[-(q + x) % example.MODULUS] for x in range(example.MODULUS))
            for q in range(example.MODULUS)
        ]
        assert labels.bool().tolist() == found


@pytest.mark.libraries("torch")
def test_triples_can_be_told_by_the_layer_set_by_hand() -> None:
    pytest.importorskip("torch")
    from examples import noisy_triples as example

    net = example.by_hand(30, 256)
    few, many = (example.accuracy(net, example.Task(n), 24)["right"] for n in (16, 1024))
    assert few < 0.75 < 0.93 < many


@pytest.mark.libraries("torch")
def test_triples_are_learned_by_every_model() -> None:
    torch = pytest.importorskip("torch")
    from examples import noisy_triples as example

    given = argparse.Namespace(steps=3, batch=4)
    for attention in example.MODELS.values():
        torch.manual_seed(0)
        net = example.Net(attention())
        before = [p.detach().clone() for p in net.parameters()]
        looked_at = example.train(net, example.Task(16), given, 1e-2, 0, lambda steps: steps)
        assert [step for step, _ in looked_at] == [1, 2, 3]
        assert all(torch.isfinite(p).all() for p in net.parameters())
        assert any((p != q).any() for p, q in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("name", ["two_hops", "what_followed"])
@pytest.mark.libraries("torch")
def test_hops_and_followers_are_learned_by_every_model(name: str) -> None:
    torch = pytest.importorskip("torch")
    example = importlib.import_module(f"examples.{name}")

    given = argparse.Namespace(steps=2, batch=2)
    for model in example.MODELS.values():
        torch.manual_seed(0)
        net = model.make()
        before = [p.detach().clone() for p in net.parameters()]
        assert [step for step, _ in example.train(net, given, 1e-2, 0, lambda steps: steps)] == [1, 2]
        assert all(torch.isfinite(p).all() for p in net.parameters())
        assert any((p != q).any() for p, q in zip(before, net.parameters(), strict=True))


@pytest.mark.libraries("torch")
def test_two_hops_end_where_most_statements_lead_one_after_the_other() -> None:
    torch = pytest.importorskip("torch")
    from examples import two_hops as example

    f, g, wanted = example.Task(2000).batch(3, torch.Generator().manual_seed(0))

    def most_said(statements: torch.Tensor, of: int) -> int:
        return int(statements[statements[:, 0] == of, 1].mode().values)

    for of_f, of_g, ends in zip(f, g, wanted, strict=True):
        assert ends.tolist() == [most_said(of_g, most_said(of_f, x)) for x in range(example.NAMES)]
    assert (example.counted(f, g).argmax(-1) == wanted).all()
    few = [int(((f[0, :, 0] == 2) & (f[0, :, 1] == y)).sum()) for y in range(example.NAMES)]
    then = [int(((g[0, :, 0] == y) & (g[0, :, 1] == 3)).sum()) for y in range(example.NAMES)]
    assert example.counted(f, g)[0, 2, 3] == sum(m * n for m, n in zip(few, then, strict=True))


@pytest.mark.libraries("torch")
def test_followers_are_counted_and_weighed_as_one_by_one() -> None:
    torch = pytest.importorskip("torch")
    from examples import what_followed as example

    x, wanted = example.Task(40).batch(2, torch.Generator().manual_seed(0))
    counted = example.counted(x)
    for b, i in ((0, 0), (0, 17), (1, 39)):
        behind = [int(x[b, j + 1]) for j in range(i) if x[b, j] == x[b, i]]
        assert counted[b, i].tolist() == [behind.count(c) for c in range(example.SYMBOLS)]
    x, wanted = example.Task(1500).batch(4, torch.Generator().manual_seed(1))
    often = (x[:, 1:] == wanted[:, :-1]).float().mean()
    assert abs(often - (example.FAVOURITE + (1 - example.FAVOURITE) / example.SYMBOLS)) < 0.03
    task = example.Task(example.TRAINED)
    count, best = (example.accuracy(answer, task, 400) for answer in (example.counted, example.weighed))
    assert 0.8 < count < best < 1
    chance = (1 - example.FAVOURITE) / example.SYMBOLS
    likely = np.zeros(example.SYMBOLS)
    for favourites in itertools.permutations(range(example.SYMBOLS)):
        steps = [chance + example.FAVOURITE * (favourites[x[0, j]] == x[0, j + 1]) for j in range(9)]
        likely[favourites[x[0, 9]]] += np.prod(steps)
    np.testing.assert_allclose(example.weighed(x)[0, 9].numpy(), likely / likely.sum(), rtol=1e-12)


@pytest.mark.libraries("torch")
def test_followers_are_seen_by_positions_alone() -> None:
    torch = pytest.importorskip("torch")
    from examples import what_followed as example

    x, _ = example.Task(12).batch(1, torch.Generator().manual_seed(0))
    turned = torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)
    for positions in (None, "rotary"):
        torch.manual_seed(0)
        net = example.Pairs(positions)
        with torch.no_grad():
            apart = (net(x) - net(turned))[:, -1].abs().max()
        # Without positions a row sees a set.
        assert (apart < 1e-4) == (positions is None)


@pytest.mark.libraries("torch")
def test_text_to_judge_by_is_none_that_was_learned() -> None:
    pytest.importorskip("torch")
    from examples import language_model as example

    seen, unseen = (bytes(part.tolist()).decode() for part in example.reference())
    assert len(seen) > 8 * len(unseen) > 8 * 2 * max(example.JUDGED)
    # The paragraph that the cut goes through has a half on each side.
    learned, judge = ({" ".join(p.split()) for p in text.split("\n\n")} for text in (seen, unseen))
    assert not learned & judge


@pytest.mark.thorough
@pytest.mark.libraries("torch")
def test_language_models_see_no_later_byte_and_have_as_many_weights() -> None:
    torch = pytest.importorskip("torch")
    from examples import language_model as example

    sizes = []
    for name, blocks in example.MODELS.items():
        torch.manual_seed(0)
        net = example.Net(blocks)
        text = torch.randint(0, example.BYTES, (1, 40))
        other = text.clone()
        other[0, 25:] = (other[0, 25:] + 1) % example.BYTES
        with torch.no_grad():
            before, after = net(text), net(other)
        torch.testing.assert_close(before[:, :25], after[:, :25], msg=name)
        assert (before[:, 25:] - after[:, 25:]).abs().amax(-1).min() > 1e-3
        sizes.append(sum(p.numel() for p in net.parameters()))
    assert max(sizes) < 1.001 * min(sizes)


@pytest.mark.thorough
@pytest.mark.libraries("torch")
def test_language_models_learn_the_same_from_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from examples import language_model as example

    # Shorter than it is trained for the page; what is judged is a sum over contexts all the same.
    for name, value in (("TRAINED", 64), ("JUDGED", (64, 128))):
        monkeypatch.setattr(example, name, value)
    text = example.reference()
    monkeypatch.setattr(example, "reference", lambda: (text[0], text[1][:1000]))
    given = argparse.Namespace(steps=2, batch=2, rate=1e-2, quick=False)
    for model in example.MODELS:
        runs = [example.learned(model, 0, given, lambda steps, words: steps) for _ in range(2)]
        bits, again = ([row["bits"] for row in rows] for rows in runs)
        assert bits == again
        assert [(row["step"], row["rows"]) for row in runs[0]] == [(1, 64), (2, 64), (2, 128)]
        assert bits[1] < bits[0] < 9


@pytest.mark.libraries("torch")
def test_the_overview_is_made_from_the_tables() -> None:
    pytest.importorskip("torch")
    from examples import overview

    tables = {name: load(PAGES / f"{name}.csv") for name in overview.TABLES}
    assert overview.page(tables) == (PAGES / "overview.md").read_text(encoding="utf-8")
    assert (PAGES / "overview.png").exists()
