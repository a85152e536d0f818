"""The comparators' formulas once more, token by token and tap by tap, in float64 NumPy: what bench/peers is tested against.

A core takes the module (for its parameters only) and q, k, v of one picture, (H, N, d) each, and returns (H, N, d).
"""

import math

import numpy as np
from scipy.special import erf, expit


def weighted(weights, v):
    """Rows of weights, already normalised, over values."""
    return np.einsum("hnm,hmd->hnd", weights, v)


def softmax_rows(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(q, k):
    return np.einsum("hnd,hmd->hnm", q, k) / math.sqrt(q.shape[-1])


def array(t):
    return t.detach().double().numpy()


def merge(x):
    """(H, N, d) as (N, D)."""
    return np.concatenate(list(x), axis=-1)


def split(x, H):
    """(N, D) as (H, N, d)."""
    return np.stack(np.split(x, H, axis=-1))


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def softmax(m, q, k, v):
    return weighted(softmax_rows(scores(q, k)), v)


def linformer(m, q, k, v):
    E, G = array(m.E), array(m.G)
    keys = np.stack([sum(np.outer(E[n], kh[n]) for n in range(len(kh))) for kh in k])
    values = np.stack([sum(np.outer(G[n], vh[n]) for n in range(len(vh))) for vh in v])
    return softmax(m, q, keys, values)


def performer(m, q, k, v):
    W, root = array(m.W), q.shape[-1] ** 0.25
    pq, pk = (np.einsum("hnd,md->hnm", x / root, W) for x in (q, k))
    half_q, half_k = ((x**2).sum(-1, keepdims=True) / (2 * root**2) for x in (q, k))
    phi_q = np.exp(pq - half_q - pq.max(-1, keepdims=True)) + 1e-4
    phi_k = np.exp(pk - half_k - pk.max((-2, -1), keepdims=True)) + 1e-4
    kernel = np.einsum("hnf,hmf->hnm", phi_q, phi_k)
    return weighted(kernel / kernel.sum(-1, keepdims=True), v)


def soft(m, q, k, v):
    d, r, (rows, columns) = q.shape[-1], m.stride, m.grid
    q = q / d**0.25
    conv, gain, shift = array(m.conv.weight), array(m.norm.weight), array(m.norm.bias)
    out = []
    for qh, vh in zip(q, v):
        picture, marks = qh.reshape(rows, columns, d), []
        for i in range(rows // r):
            for j in range(columns // r):
                patch = picture[i * r : (i + 1) * r, j * r : (j + 1) * r]
                x = np.einsum("abd,edab->e", patch, conv)
                marks.append(gelu((x - x.mean()) / math.sqrt(x.var() + 1e-5) * gain + shift))
        marks = np.stack(marks)
        near, own = (np.exp(-((a[:, None] - marks[None]) ** 2).sum(-1) / 2) for a in (qh, marks))
        P = own + 0.01 * np.eye(len(marks))
        V = 1.8 / own.sum(1).max() ** 2 * P
        for _ in range(20):
            V = V @ (2 * np.eye(len(P)) - P @ V)
        out.append(near @ V @ (near.T @ vh))
    return np.stack(out)


def normalised(q, k, v, rotated_q, rotated_k):
    weights = np.einsum("hnd,hmd->hnm", rotated_q, rotated_k) / v.shape[1]
    total = np.einsum("hnd,hmd->hn", q, k) / v.shape[1] + 1e-6
    return weighted(weights / total[..., None], v)


def flatten(m, q, k, v):
    scale = np.log1p(np.exp(array(m.scale)))[0]
    focused = []
    for x in (merge(q), merge(k) + array(m.positions)[0]):
        t = (np.maximum(x, 0) + 1e-6) / scale
        focused.append(split(np.stack([r**3 / np.linalg.norm(r**3) * np.linalg.norm(r) for r in t]), len(q)))
    return normalised(*focused, v, *focused)


def agent(m, q, k, v):
    H, N, d = q.shape
    rows, columns = m.grid
    picture, agents = merge(q).reshape(rows, columns, -1), []
    for i in range(7):
        for j in range(7):
            part = [slice(x * n // 7, -(-(x + 1) * n // 7)) for x, n in ((i, rows), (j, columns))]
            agents.append(picture[part[0], part[1]].mean((0, 1)))
    agents = split(np.stack(agents), H)
    biases = []
    for i in range(2):
        across = interpolate(array(m.maps[i]), rows, 2)
        full = interpolate(across, columns, 3) + array(m.rows[i]) + array(m.columns[i])
        biases.append(full.reshape(H, 49, N))
    gathered = weighted(softmax_rows(scores(agents, k) + biases[0]), v)
    return weighted(softmax_rows(scores(q, agents) + biases[1].transpose(0, 2, 1)), gathered)


def interpolate(x, size, axis):
    """Linear interpolation between the centres of cells."""
    n = x.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(np.floor(at).astype(int), n - 2)
    share = (at - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return np.take(x, low, axis) * (1 - share) + np.take(x, low + 1, axis) * share


def rotate(m, x):
    """Complex rotation of pairs: the first half by the row, the second by the column."""
    rows, columns = m.grid
    x = merge(x)
    D = x.shape[1]
    theta = 10000.0 ** (-np.arange(D // 4) / (D // 4))
    out = np.empty_like(x)
    for n in range(len(x)):
        angles = np.concatenate([(n // columns) * theta, (n % columns) * theta])
        turned = (x[n, 0::2] + 1j * x[n, 1::2]) * np.exp(1j * angles)
        out[n, 0::2], out[n, 1::2] = turned.real, turned.imag
    return split(out, m.num_heads)


def mlla(m, q, k, v):
    q, k = elu1(q), elu1(k)
    return normalised(q, k, v, rotate(m, q), rotate(m, k))


def inline(m, q, k, v):
    S, N = scores(q, k), q.shape[1]
    return weighted((S - S.mean(-1, keepdims=True)) / N + 1 / N, v)


def rala(m, q, k, v):
    q, k = elu1(q), elu1(k)
    alpha = softmax_rows(np.einsum("hd,hmd->hm", q.mean(1), k) / math.sqrt(q.shape[-1]))
    k = q.shape[1] * alpha[..., None] * k
    return normalised(q, k, v, rotate(m, q), rotate(m, k))


def qt_vit(m, q, k, v):
    features = []
    for x in (q, k):
        squares = x**2 / np.linalg.norm(x**2, axis=-1, keepdims=True)
        features.append(np.concatenate([squares, np.full((*x.shape[:2], 1), m.constant.item())], -1))
    kernel = np.einsum("hnf,hmf->hnm", *features)
    return weighted(kernel / (kernel.sum(-1, keepdims=True) + 1e-15), v)


def luna(m, q, k, v):
    W, b = array(m.W), array(m.b)
    first, second = m.psi[0], m.psi[2]
    features = []
    for x in (q, k):
        p = np.einsum("hnd,md->hnm", x, W) + b
        hidden = np.maximum(p[..., None] * array(first.weight)[:, 0] + array(first.bias), 0)
        psi = np.maximum(np.einsum("hnmj,lj->hnml", hidden, array(second.weight)) + array(second.bias), 0)
        features.append(psi.reshape(*x.shape[:2], -1) / math.sqrt(len(W)))
    kernel = np.einsum("hnf,hmf->hnm", *features)
    return weighted(kernel / kernel.sum(-1, keepdims=True), v)


def cosformer(m, q, k, v):
    N = q.shape[1]
    kernel = np.einsum("hnd,hmd->hnm", np.maximum(q, 0), np.maximum(k, 0))
    i = np.arange(1, N + 1)
    kernel = kernel * np.cos(math.pi / 2 * (i[:, None] - i[None]) / N)
    return weighted(kernel / np.maximum(kernel.sum(-1, keepdims=True), 1e-6), v)


def fastformer(m, q, k, v):
    root, out = math.sqrt(q.shape[-1]), []
    for qh, kh, a, b in zip(q, k, array(m.w_a)[..., 0], array(m.w_b)[..., 0]):
        p = kh * (softmax_rows(qh @ a / root) @ qh)
        out.append((softmax_rows(p @ b / root) @ p) * qh)
    return np.stack(out)


def nystromformer(m, q, k, v):
    N, marks = q.shape[1], m.landmarks
    parts = [slice(i * N // marks, -(-(i + 1) * N // marks)) for i in range(marks)]
    qm, km = (np.stack([x[:, part].mean(1) for part in parts], 1) for x in (q, k))
    F1, A, F3 = softmax_rows(scores(q, km)), softmax_rows(scores(qm, km)), softmax_rows(scores(qm, k))
    out = []
    for f1, a, f3, vh in zip(F1, A, F3, v):
        one = np.eye(marks)
        Z = a.T / (np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf))
        for _ in range(6):
            Z = 0.25 * Z @ (13 * one - a @ Z @ (15 * one - a @ Z @ (7 * one - a @ Z)))
        out.append(f1 @ Z @ f3 @ vh)
    return np.stack(out)


def sigmoid(m, q, k, v):
    return weighted(expit(scores(q, k) - math.log(q.shape[1])), v)


def linear_attention(m, q, k, v):
    return normalised(elu1(q), elu1(k), v, elu1(q), elu1(k))


def simple_linear(m, q, k, v):
    return weighted(np.tril(scores(q, k)), v)


def window(m, q, k, v):
    from bench.peers import window

    S, i = scores(q, k), np.arange(q.shape[1])
    apart = i[:, None] - i[None]
    return weighted(softmax_rows(np.where((apart >= 0) & (apart < window.WIDTH), S, -np.inf)), v)


def gated_deltanet(m, q, k, v):
    out = np.empty_like(v)
    for h, (beta, decay) in enumerate(zip(expit(array(m.beta)), expit(array(m.g)))):
        S = np.zeros((k.shape[2], v.shape[2]))
        for n in range(q.shape[1]):
            key = k[h, n] / np.linalg.norm(k[h, n])
            S = decay * S
            S = S + np.outer(key, beta * (v[h, n] - S.T @ key))
            out[h, n] = S.T @ q[h, n] / math.sqrt(q.shape[2])
    return out


def frwkv(m, q, k, v):
    m_r, m_x, beta, w, a = (array(t) for t in (m.m_r, m.m_x, m.beta, m.w.sigmoid(), m.a.sigmoid()))
    out = np.empty_like(v)
    for h in range(len(q)):
        S = np.zeros((v.shape[2], k.shape[2]))
        for n in range(q.shape[1]):
            erase = m_r[h] * k[h, n] / np.linalg.norm(m_r[h] * k[h, n])
            key = k[h, n] * (1 + (a[h] - 1) * m_x[h])
            S = S @ (np.diag(w[h]) - np.outer(erase, a[h] * erase)) + np.outer(v[h, n], key)
            out[h, n] = S @ q[h, n] + 0.2 * (q[h, n] @ key) * beta[h] * v[h, n]
    return out


def relu(m, q, k, v):
    return weighted(np.maximum(scores(q, k), 0) / q.shape[1], v)


def mean(m, q, k, v):
    return np.stack([np.tile(vh.mean(0), (len(vh), 1)) for vh in v])


def linear_infsa(m, q, k, v, tied=True):
    out, k = [], q if tied else k
    for qh, kh, vh in zip(q, k, v):
        u, kappa = (x / math.sqrt(x.shape[-1]) for x in (qh, kh))
        energy = [np.linalg.norm(row) for row in u]
        central = sum(e * row for e, row in zip(energy, u)) / (sum(energy) + 1e-6)
        r = [max(0.0, float(central @ row)) for row in kappa]
        out.append(np.tile(0.95 * sum(a * row for a, row in zip(r, vh)) / (sum(r) + 1e-6), (len(qh), 1)))
    return np.stack(out)


def linear_infsa_floor(m, q, k, v):
    """A mixture of Linear-InfSA and the mean of the values, by the sums of both."""
    out = []
    for qh, kh, vh in zip(q, q, v):
        u, kappa = (x / math.sqrt(x.shape[-1]) for x in (qh, kh))
        energy = np.linalg.norm(u, axis=1)
        t = kappa @ (energy @ u / (energy.sum() + 1e-6))
        positive, share = np.maximum(t, 0), 0.1 * np.abs(t).sum()
        row = 0.95 * (positive @ vh + share * vh.mean(0)) / (positive.sum() + share + 1e-6)
        out.append(np.tile(row, (len(qh), 1)))
    return np.stack(out)


def pure_infsa(m, q, k, v, tied=True):
    P = np.maximum(scores(q, q if tied else k) / math.sqrt(q.shape[-1]), 0)
    return 0.95 * weighted(P / (np.sqrt((P**2).sum((1, 2), keepdims=True)) + 1e-6), v)


def convolve(x, weight, bias, grid):
    """A depthwise convolution with zeros around, tap by tap: x (N, C), weight (C, a, b)."""
    rows, columns = grid
    a, b = weight.shape[1:]
    padded = np.pad(x.reshape(rows, columns, -1), ((a // 2,) * 2, (b // 2,) * 2, (0, 0)))
    out = sum(padded[i : i + rows, j : j + columns] * weight[:, i, j] for i in range(a) for j in range(b))
    return out.reshape(len(x), -1) + (0 if bias is None else bias)
