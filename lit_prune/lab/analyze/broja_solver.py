"""Interior-point solver of the BROJA problem for many pairs at once, by its geometric-programming dual.

Primal: minimise Σ q(t,a,b)·log(q(t,a,b)/q(a,b)) over q ≥ 0 with the marginals p(t,a) and p(t,b). Every optimal cell
(a,b) is either empty or positive for all t that its marginals allow, so one multiplier a cell is enough. Dual: minimise
Σ p(t,a)·α(t,a) + Σ p(t,b)·β(t,b) subject to F(a,b) = log Σ_t exp(-α(t,a)-β(t,b)) ≤ 0; the multiplier of that
constraint is q(a,b), and q(t,a,b) = q(a,b)·exp(-α-β-F). Each Newton step solves one system of T·(A+B) unknowns.

Source: primal-dual method of Boyd and Vandenberghe, Convex Optimization, section 11.7.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

CENTRING = (
    0.2  # share of the complementarity aimed at in a step; 0.03 takes twice the steps, 0.3 stalls on cells of 1e-8
)
BACKTRACK = 0.7
BACKTRACKS = 40
TO_BOUNDARY = 0.99
STEPS = 100
LONGEST = 4.0  # rise of α or β in a step, a factor e⁻⁴ in a probability; more, and rare cells underflow
RIDGE = 1e-13  # of the system scaled to a unit diagonal


@dataclass(frozen=True)
class Problem:
    """Marginals of a batch of pairs.

    Attributes:
        first: p(t,a), [P, T, A].
        second: p(t,b), [P, T, B].
    """

    first: Tensor
    second: Tensor

    @property
    def allowed(self) -> Tensor:
        """Boolean [P, T, A, B]: cells that the marginals do not force to zero."""
        return (self.first[..., None] > 0) & (self.second[:, :, None] > 0)

    @property
    def values(self) -> Tensor:
        """Both marginals in a row, [P, T·(A+B)]."""
        return torch.cat([self.first.flatten(1), self.second.flatten(1)], 1)

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """A row [P, T·(A+B)] as [P, T, A] and [P, T, B]."""
        size = self.first[0].numel()
        return row[:, :size].view_as(self.first), row[:, size:].view_as(self.second)

    def free(self) -> Tensor:
        """Boolean [P, T·(A+B)]: multipliers to solve for.

        Those of empty marginals are left out, and one a target value, because α+k and β-k are the same point.
        """
        first, second = self.first > 0, self.second > 0
        second = second.scatter(2, self.second.argmax(2, keepdim=True), False)
        return torch.cat([first.flatten(1), second.flatten(1)], 1)

    def select(self, rows: Tensor) -> Problem:
        """The pairs `rows` alone."""
        return Problem(self.first[rows], self.second[rows])


@dataclass(frozen=True)
class Iterate:
    """A strictly feasible dual point with its multipliers.

    Attributes:
        alpha: [P, T, A].
        beta: [P, T, B].
        mass: q(a,b) > 0 [P, A, B], 0 in cells that no t allows.
    """

    alpha: Tensor
    beta: Tensor
    mass: Tensor

    def moved(self, step: Tensor, direction: Iterate) -> Iterate:
        """This iterate plus step [P] times the direction."""
        step = step[:, None, None]
        return Iterate(*(getattr(self, f.name) + step * getattr(direction, f.name) for f in fields(self)))

    def select(self, rows: Tensor) -> Iterate:
        """The pairs `rows` alone."""
        return Iterate(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class State:
    """What a Newton step needs to know about an iterate.

    Attributes:
        slack: -F(a,b) > 0 [P, A, B], 1 in cells that no t allows.
        conditional: q(t|a,b) [P, T, A, B].
        joint: q(t,a,b) [P, T, A, B].
        mismatch: marginals wanted minus marginals of `joint`, [P, T·(A+B)].
        complementarity: Σ q(a,b)·slack(a,b), [P]; the duality gap once the mismatch is zero.
    """

    slack: Tensor
    conditional: Tensor
    joint: Tensor
    mismatch: Tensor
    complementarity: Tensor

    def solved(self, tolerance: float) -> Tensor:
        """Boolean [P]: gap and total mismatch below the tolerance."""
        return (self.complementarity < tolerance) & (self.mismatch.abs().sum(1) < tolerance)

    def residual(self, mass: Tensor, centre: Tensor) -> Tensor:
        """Norm of the optimality conditions, [P], for complementarity `centre` [P] in each cell of positive mass."""
        products = torch.where(mass > 0, mass * self.slack - centre[:, None, None], 0.0)
        return (self.mismatch.square().sum(1) + products.square().sum((1, 2))).sqrt()


def _marginals(joint: Tensor) -> Tensor:
    """Both marginals of [P, T, A, B] in a row, [P, T·(A+B)]."""
    return torch.cat([joint.sum(3).flatten(1), joint.sum(2).flatten(1)], 1)


def _start(problem: Problem) -> Iterate:
    """α = -½·log p(t|a) + 0.05, β likewise: feasible by the Cauchy-Schwarz inequality; mass half product, half even."""
    first, second = problem.first, problem.second
    log_first = torch.where(first > 0, first / first.sum(1, keepdim=True), 1.0).log()
    log_second = torch.where(second > 0, second / second.sum(1, keepdim=True), 1.0).log()
    target = first.sum(2)[:, :, None]
    scaled = torch.where(target > 0, first / target, 0.0)
    product = scaled.transpose(1, 2) @ second  # [P, A, B]
    used = problem.allowed.any(1)
    even = 1 / used.sum((1, 2), keepdim=True)  # without it, extreme cells start far off the central path and stall
    mass = torch.where(used, (product + even) / 2, 0.0)
    return Iterate(0.05 - 0.5 * log_first, 0.05 - 0.5 * log_second, mass)


def _state(problem: Problem, point: Iterate) -> State:
    """Slacks, distribution and residuals of an iterate."""
    allowed, used = problem.allowed, point.mass > 0
    exponent = (-point.alpha[..., None] - point.beta[:, :, None]).masked_fill(~allowed, -torch.inf)
    total = exponent.logsumexp(1)  # F, -inf where no t is allowed
    conditional = (exponent - torch.where(used, total, 0.0)[:, None]).exp()
    slack = torch.where(used, -total, 1.0)
    joint = conditional * point.mass[:, None]
    mismatch = problem.values - _marginals(joint)
    return State(slack, conditional, joint, mismatch, (point.mass * slack).sum((1, 2)))


def _system(state: State, mass: Tensor) -> Tensor:
    """Newton matrix [P, T·(A+B), T·(A+B)]: Σ_ab q·∇²F + (q/slack)·∇F∇Fᵀ; both diagonal blocks are block diagonal."""
    pairs, targets, firsts, seconds = state.joint.shape
    weight = mass / state.slack - mass
    blocks = state.conditional[:, :, None] * (state.conditional * weight[:, None])[:, None]  # [P, T, T, A, B]
    blocks.diagonal(dim1=1, dim2=2).add_(state.joint.permute(0, 2, 3, 1))
    size = targets * firsts
    matrix = mass.new_zeros(pairs, size + targets * seconds, size + targets * seconds)
    upper = matrix[:, :size, :size].view(pairs, targets, firsts, targets, firsts)
    upper.diagonal(dim1=2, dim2=4).copy_(blocks.sum(4))
    lower = matrix[:, size:, size:].view(pairs, targets, seconds, targets, seconds)
    lower.diagonal(dim1=2, dim2=4).copy_(blocks.sum(3))
    across = blocks.permute(0, 1, 3, 2, 4).reshape(pairs, size, targets * seconds)
    matrix[:, :size, size:] = across
    matrix[:, size:, :size] = across.transpose(1, 2)
    return matrix


def _solve(matrix: Tensor, right: Tensor, free: Tensor) -> Tensor:
    """Solution [P, M] over the free unknowns, 0 elsewhere; scaled to a unit diagonal first."""
    scale = torch.where(free, matrix.diagonal(dim1=1, dim2=2), 1.0).rsqrt() * free
    matrix = matrix * scale[:, :, None] * scale[:, None]
    matrix.diagonal(dim1=1, dim2=2).fill_(1 + RIDGE)
    factor = torch.linalg.cholesky_ex(matrix).L
    return scale * torch.cholesky_solve((scale * right)[..., None], factor).squeeze(2)


def _direction(problem: Problem, point: Iterate, state: State, centre: Tensor) -> Iterate:
    """Newton direction towards complementarity `centre` [P] in every cell."""
    wanted = torch.where(point.mass > 0, centre[:, None, None] / state.slack, 0.0)
    right = _marginals(wanted[:, None] * state.conditional) - problem.values
    move = _solve(_system(state, point.mass), right, problem.free())
    alpha, beta = problem.split(move)
    change = -(state.conditional * (alpha[..., None] + beta[:, :, None])).sum(1)  # of F, [P, A, B]
    return Iterate(alpha, beta, wanted - point.mass + point.mass / state.slack * change)


def _advance(problem: Problem, point: Iterate, state: State) -> tuple[Iterate, State, Tensor]:
    """One damped step; the boolean [P] says which pairs moved (the others are left where they were)."""
    centre = CENTRING * state.complementarity / (point.mass > 0).sum((1, 2))
    direction = _direction(problem, point, state, centre)
    ratio = torch.where(direction.mass < 0, -point.mass / direction.mass, torch.inf)
    step = (TO_BOUNDARY * ratio.flatten(1).amin(1)).clamp_max(1)
    farthest = torch.maximum(direction.alpha.flatten(1).amax(1), direction.beta.flatten(1).amax(1))
    step = torch.minimum(step, LONGEST / farthest.clamp_min(LONGEST))
    before = state.residual(point.mass, centre)
    for _ in range(BACKTRACKS):
        trial = point.moved(step, direction)
        reached = _state(problem, trial)
        good = reached.residual(trial.mass, centre) <= (1 - 0.01 * step) * before
        good &= reached.slack.amin((1, 2)) > 0
        if good.all():
            break
        step = torch.where(good, step, BACKTRACK * step)
    return trial, reached, good


def solve_broja(problem: Problem, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """A feasible primal point and a dual point of every pair.

    A pair leaves the batch when it is solved, or when rounding lets it move no further.

    Args:
        problem: the marginals, float64, each pair's summing to 1.
        tolerance: complementarity (nats) and total marginal mismatch to stop at.

    Returns:
        q(t,a,b) [P, T, A, B] with exactly the given marginals, α [P, T, A] and β [P, T, B], dual feasible.
    """
    point = _start(problem)
    result = Iterate(*(getattr(point, f.name).clone() for f in fields(point)))
    rows = torch.arange(len(problem.first), device=problem.first.device)
    rest, state = problem, _state(problem, point)
    for _ in range(STEPS):
        trial, reached, good = _advance(rest, point, state)
        for f in fields(result):
            kept = torch.where(good[:, None, None], getattr(trial, f.name), getattr(point, f.name))
            getattr(result, f.name)[rows] = kept
        going = good & ~reached.solved(tolerance)
        rows, rest, point = rows[going], rest.select(going), trial.select(going)
        state = State(*(getattr(reached, f.name)[going] for f in fields(reached)))
        if not len(rows):
            break
    joint = _state(problem, result).joint
    return _feasible(problem, joint), result.alpha, result.beta


def _feasible(problem: Problem, joint: Tensor) -> Tensor:
    """The nearest simple q with exactly the marginals: scale down what exceeds them, add the rest as a product.

    Source: Altschuler, Weed and Rigollet 2017, algorithm 2.
    """
    first, second = problem.first, problem.second
    rows = joint.sum(3)
    joint = joint * torch.where(rows > first, first / rows, 1.0)[..., None]
    columns = joint.sum(2)
    joint = joint * torch.where(columns > second, second / columns, 1.0)[:, :, None]
    missing_first = (first - joint.sum(3)).clamp_min(0)
    missing_second = (second - joint.sum(2)).clamp_min(0)
    total = missing_first.sum(2)[:, :, None, None]
    patch = missing_first[..., None] * missing_second[:, :, None]
    return joint + torch.where(total > 0, patch / total, 0.0)
