"""Mean pooling: z = mean_n v, the floor of every global pooler. The layer pools first and projects one row."""

from .mechanism import Mechanism, wide


class Mean(Mechanism):
    NAME, LABEL, SOURCE = "mean", "Mean pooling", "-"
    TIME, STATE = "N D", "d"
    PROJECTIONS, POOLED = "v", True

    def core(self, q, k, v):
        return wide(v).mean(-2, keepdim=True).to(v.dtype)

    def forward(self, x):
        return self.out_proj(self.v_proj(wide(x).mean(1, keepdim=True).to(x.dtype)))
