"""What is kept of a teacher, and the loss from it, against full logits in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.distill.cached import (
    CachedRecord,
    cached_record,
    collate_cached,
    gram_side,
    pack_gram,
    teacher_top_k,
    unpack_gram,
)
from grace.distill.gdkd import confidence_gate, dkd_per_token, fused_ce_gdkd, kl_per_token
from grace.distill.objective import micro_batch_loss
from grace.distill.rcka import rcka_per_image, rcka_to_grams
from grace.distill.top_k import TopK, concatenate

CE, KD = 0.01, 0.07


def models(tokens: int, vocabulary: int, scale: float = 1.0, seed: int = 0, beyond: int = 0):
    """(student hidden, head, teacher hidden, head, targets); the student has `beyond` more entries."""
    torch.manual_seed(seed)
    student = torch.randn(tokens, 12) * scale, torch.randn(vocabulary + beyond, 12)
    teacher = torch.randn(tokens, 20) * scale, torch.randn(vocabulary, 20)
    return *student, *teacher, torch.randint(vocabulary, (tokens,))


def coarse_nckd(student_TV: Tensor, teacher_TV: Tensor, top_k: TopK, targets_T: Tensor, tau: float) -> Tensor:
    """NCKD over the kept tokens and one residual, by the definition."""
    losses = []
    for i, target in enumerate(targets_T.tolist()):
        kept = top_k.ids_TK[i].tolist()
        others = [j for j in range(teacher_TV.shape[1]) if j != target and j not in kept]
        away = torch.tensor([target])
        p, q = (
            F.log_softmax(x[i].index_fill(0, away, -torch.inf) / tau, -1) for x in (teacher_TV, student_TV)
        )
        coarse = [torch.stack([*d[kept], *([d[others].logsumexp(-1)] if others else [])]) for d in (p, q)]
        losses.append((coarse[0].exp() * (coarse[0] - coarse[1])).sum())
    return torch.stack(losses)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 7), vocabulary=st.integers(2, 60), k=st.integers(1, 70), beyond=st.integers(0, 5),
    temperature=st.sampled_from([0.7, 1.0, 2.0, 4.0]), scale=st.sampled_from([0.05, 1.0, 3.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_coarse_definition(
    tokens: int, vocabulary: int, k: int, beyond: int, temperature: float, scale: float, seed: int
) -> None:
    hidden, head, teacher, teacher_head, targets = models(tokens, vocabulary, scale, seed, beyond)
    top_k = teacher_top_k(teacher, teacher_head, targets, k, temperature=temperature)
    leaves = [t.clone().requires_grad_() for t in (hidden, head)]
    total, parts = fused_ce_gdkd(
        leaves[0],
        leaves[1],
        None,
        None,
        targets,
        ce_scale=CE,
        gdkd_scale=KD,
        temperature=temperature,
        teacher_top_k=top_k,
    )
    total.backward()
    exact = [t.double().requires_grad_() for t in (hidden, head)]
    all_TV, teacher_TV = exact[0] @ exact[1].T, teacher.double() @ teacher_head.double().T
    student_TV = all_TV[:, :vocabulary]
    tckd_T = dkd_per_token(student_TV, teacher_TV, targets, temperature, 1.0, 0.0)
    nckd_T = temperature**2 * coarse_nckd(student_TV, teacher_TV, top_k, targets, temperature)
    gate_T = confidence_gate(teacher_TV)
    expected = (
        CE * F.cross_entropy(all_TV, targets, reduction="sum") + KD * (gate_T * (tckd_T + 4 * nckd_T)).sum()
    )
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert parts.gate_sum.item() == pytest.approx(gate_T.sum().item(), rel=1e-5)
    for got, want in zip(leaves, exact, strict=True):
        assert got.grad is not None and want.grad is not None
        assert (got.grad.double() - want.grad).norm() <= 2e-5 * want.grad.norm() + 1e-7


@pytest.mark.parametrize("kind", ["gdkd", "kl"])
def test_all_tokens_kept_is_the_living_teacher(kind: str) -> None:
    hidden, head, teacher, teacher_head, targets = models(40, 50, beyond=3)
    top_k = teacher_top_k(teacher, teacher_head, targets, 49)
    assert (top_k.residual_T2 == -torch.inf).all()
    weight = None if kind == "kl" else 4.0
    results = []
    for source in ((teacher, teacher_head, None), (None, None, top_k)):
        leaf = hidden.clone().requires_grad_()
        total, parts = fused_ce_gdkd(
            leaf,
            head,
            *source[:2],
            targets,
            ce_scale=CE,
            gdkd_scale=KD,
            nckd_weight=weight,
            teacher_top_k=source[2],
        )
        total.backward()
        results.append((total.detach(), parts.gdkd_sum, parts.gate_sum, leaf.grad))
    for online, cached in zip(*results, strict=True):
        torch.testing.assert_close(cached, online, rtol=1e-5, atol=1e-7)


def test_the_coarse_divergence_grows_with_k_up_to_the_true_one() -> None:
    hidden, head, teacher, teacher_head, targets = models(60, 200)
    full = teacher_top_k(teacher, teacher_head, targets, 199)
    values = [
        fused_ce_gdkd(hidden, head, None, None, targets, ce_scale=0, gdkd_scale=1, teacher_top_k=full.keep(k))[1].gdkd_sum.item()
        for k in (1, 4, 16, 64, 199)
    ]  # fmt: skip
    true = fused_ce_gdkd(hidden, head, teacher, teacher_head, targets, ce_scale=0, gdkd_scale=1)[
        1
    ].gdkd_sum.item()
    assert values == sorted(values) and values[0] < 0.9 * true
    assert values[-1] == pytest.approx(true, rel=1e-5)


def test_log_probabilities_are_those_of_the_whole_vocabulary() -> None:
    _, _, teacher, head, targets = models(30, 100, scale=2.0)
    kept = teacher_top_k(teacher, head, targets, 8, temperature=3.0)
    logits_TV = teacher.double() @ head.double().T
    for column, tau, log_prob_TK in ((0, 1.0, kept.log_prob_TK), (1, 3.0, kept.tempered_TK())):
        log_TV = F.log_softmax(logits_TV / tau, -1)
        target_T1 = targets.unsqueeze(-1)
        torch.testing.assert_close(kept.target_T2[:, column].double(), log_TV.gather(-1, target_T1).squeeze(-1), rtol=1e-4, atol=1e-5)  # fmt: skip
        rest_TV = log_TV.scatter(-1, target_T1, -torch.inf)
        values, ids = rest_TV.topk(8)
        assert (kept.ids_TK == ids).all()
        torch.testing.assert_close(log_prob_TK.double(), values, rtol=1e-5, atol=1e-5)
        residual_T = rest_TV.scatter(-1, ids, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(kept.residual_T2[:, column].double(), residual_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.gate_T.double(), confidence_gate(logits_TV), rtol=1e-5, atol=0)


def test_keeping_fewer_is_having_kept_fewer() -> None:
    _, _, teacher, head, targets = models(30, 100)
    many, few = (teacher_top_k(teacher, head, targets, k) for k in (64, 5))
    for name, value in many.keep(5).tensors().items():
        torch.testing.assert_close(value, few.tensors()[name], rtol=1e-5, atol=1e-5, msg=name)
    assert few.keep(5) is few


@pytest.mark.parametrize("margin", [30.0, 300.0])
@pytest.mark.parametrize("right", [True, False])
def test_certain_teachers_and_students(margin: float, right: bool) -> None:
    """Log-odds do not come from 1 - p: certainty keeps its digits."""
    teacher_TV, targets = torch.randn(4, 20), torch.tensor([0, 1, 2, 3])
    teacher_TV[range(4), targets if right else targets + 4] += margin
    student_TV = torch.randn(4, 20, requires_grad=True)
    top_k = teacher_top_k(teacher_TV, torch.eye(20), targets, 19)
    total, _ = fused_ce_gdkd(
        student_TV, torch.eye(20), None, None, targets, ce_scale=0, gdkd_scale=1, teacher_top_k=top_k
    )
    expected = dkd_per_token(student_TV.detach().double(), teacher_TV.double(), targets)
    total.backward()
    gate_T = confidence_gate(teacher_TV.double())
    assert total.item() == pytest.approx((gate_T * expected).sum().item(), rel=1e-4)
    assert student_TV.grad is not None and student_TV.grad.isfinite().all()


def test_plain_kl_takes_no_gate() -> None:
    hidden, head, teacher, teacher_head, targets = models(10, 30)
    top_k = teacher_top_k(teacher, teacher_head, targets, 29)
    parts = fused_ce_gdkd(
        hidden, head, None, None, targets, ce_scale=0, gdkd_scale=1, nckd_weight=None, teacher_top_k=top_k
    )[1]
    kl = kl_per_token((hidden @ head.T).double(), (teacher @ teacher_head.T).double()).sum()
    assert parts.gdkd_sum.item() == pytest.approx(kl.item(), rel=1e-5) and parts.gate_sum.item() == 10


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_and_a_vocabulary_of_one(tokens: int) -> None:
    for vocabulary in (1, 5):
        hidden, head, teacher, teacher_head, targets = models(tokens, vocabulary)
        top_k = teacher_top_k(teacher, teacher_head, targets, 16)
        hidden.requires_grad_()
        total, _ = fused_ce_gdkd(
            hidden, head, None, None, targets, ce_scale=1, gdkd_scale=1, teacher_top_k=top_k
        )
        total.backward()
        assert total.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, teacher, teacher_head, targets = models(6, 30)
    top_k = teacher_top_k(teacher, teacher_head, targets, 4)

    def loss(**change) -> None:
        given = {
            "teacher_hidden_TE": None,
            "teacher_head_VE": None,
            "targets_T": targets,
            "teacher_top_k": top_k,
        }
        fused_ce_gdkd(hidden, head, ce_scale=1, gdkd_scale=1, **(given | change))

    with pytest.raises(ValueError, match="at temperature 2 does not fit"):
        loss(temperature=1.0)
    with pytest.raises(ValueError, match="what is known of 5 tokens"):
        loss(teacher_top_k=teacher_top_k(teacher[:5], teacher_head, targets[:5], 4))
    with pytest.raises(ValueError, match="there or cached"):
        loss(teacher_hidden_TE=teacher, teacher_head_VE=teacher_head)
    with pytest.raises(ValueError, match="must be positive"):
        teacher_top_k(teacher, teacher_head, targets, 0)
    with pytest.raises(ValueError, match="outside the shared vocabulary"):
        teacher_top_k(teacher, teacher_head, targets.clone().fill_(20), 4, shared=20)
    with pytest.raises(ValueError, match="do not fit"):
        teacher_top_k(teacher, teacher_head[:, :3], targets, 4)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 99))
def test_packed_grams_give_the_loss_of_the_teacher_itself(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    student = [torch.randn(n, 8, requires_grad=True) for n in sizes]
    teacher = [torch.randn(n, 24) * 100 for n in sizes]
    grams = [unpack_gram(pack_gram(visual)) for visual in teacher]
    results = []
    for loss_N, valid_N in (rcka_per_image(student, teacher), rcka_to_grams(student, grams)):
        gradients = torch.autograd.grad(loss_N.sum(), student) if sizes else ()
        results.append((loss_N.detach(), valid_N, gradients))
    (online, valid, gradients), (cached, cached_valid, cached_gradients) = results
    assert (valid == cached_valid).all()
    torch.testing.assert_close(cached, online, rtol=2e-3, atol=2e-3)
    for one, other in zip(gradients, cached_gradients, strict=True):
        assert (one - other).norm() <= 5e-3 * one.norm() + 1e-3


def test_degenerate_images_stay_degenerate() -> None:
    constant, single = torch.ones(5, 8), torch.randn(1, 8)
    varied = torch.randn(5, 8)
    record = CachedRecord(
        teacher_top_k(torch.randn(2, 3), torch.randn(9, 3), torch.tensor([1, 2]), 4),
        tuple(pack_gram(visual) for visual in (constant, single, varied)),
    )
    signals = collate_cached([record])
    assert signals.image_count == 1
    loss_N, valid_N = rcka_to_grams([torch.randn(5, 4), torch.randn(1, 4), torch.randn(5, 4)], signals.grams)
    assert valid_N.tolist() == [False, False, True] and (loss_N > 0).tolist() == [False, False, True]


def test_near_equal_tokens_keep_their_relations_in_16_bits() -> None:
    teacher = torch.ones(6, 8) + 1e-3 * torch.randn(6, 8)
    gram = unpack_gram(pack_gram(teacher))
    assert gram.abs().max() == 1
    loss_N, valid_N = rcka_to_grams([teacher], [gram])
    assert valid_N.all() and loss_N.item() < 1e-4


def test_a_triangle_has_a_side() -> None:
    assert [gram_side(n * (n + 1) // 2) for n in (0, 1, 2, 5, 1024, 5000)] == [0, 1, 2, 5, 1024, 5000]
    with pytest.raises(ValueError, match="not the triangle"):
        gram_side(5)
    with pytest.raises(ValueError, match="do not fit a Gram"):
        rcka_to_grams([torch.randn(3, 2)], [torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="1 images of the student against 0"):
        rcka_to_grams([torch.randn(3, 2)], [])


def test_micro_batch_from_the_cache_is_that_of_the_teacher() -> None:
    """Whole objective: records collated in order give the online loss, to what 16 bits lose of the Gram."""
    hidden, head, teacher, teacher_head, targets = models(9, 40)
    visual = [torch.randn(7, 20), torch.randn(4, 20)]
    student_visual = [torch.randn(7, 12), torch.randn(4, 12)]
    records = [
        cached_record(teacher[:5], teacher_head, targets[:5], visual[:1], 39),
        cached_record(teacher[5:], teacher_head, targets[5:], visual[1:], 39),
    ]
    signals = collate_cached(records)
    common: dict[str, Any] = {"token_count": 9.0, "gate_sum": 8.0, "beta": 0.5, "kind": "gdkd"} | {
        "student_visual": student_visual, "image_count": 2.0, "omega": 3.0
    }  # fmt: skip
    online = micro_batch_loss(
        hidden,
        head,
        targets,
        teacher_hidden_TE=teacher,
        teacher_head_VE=teacher_head,
        teacher_visual=visual,
        **common,
    )
    cached = micro_batch_loss(hidden, head, targets, **signals.loss_inputs(None, True), **common)
    torch.testing.assert_close(cached[0], online[0], rtol=1e-3, atol=0)
    assert "teacher_grams" not in signals.loss_inputs(None, False)
    assert len(concatenate([r.top_k for r in records]).gate_T) == 9
