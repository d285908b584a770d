"""Reference values of last-layer Laplace from laplace-torch: writes laplace_torch.json beside this file.

Run where `pip install laplace-torch==0.3 "curvlinops-for-pytorch>=3.0.1,<3.1"` works; it needs versions that do not
install beside everything else here, so the tests read the values. A linear softmax head, all rows in batches, the
Kronecker factors that laplace-torch takes, and its functional variances: exact damping, the bias as a block of its own.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from laplace import Laplace
from torch.utils.data import DataLoader, TensorDataset

ROWS, WIDTH, CLASSES, NEW = 30, 5, 4, 3
PRIOR_VARIANCES = (0.1, 2.0, 50.0)


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    head = torch.nn.Linear(WIDTH, CLASSES)
    head.weight.data.mul_(3)
    features, new = torch.randn(ROWS, WIDTH), torch.randn(NEW, WIDTH)
    rows = DataLoader(TensorDataset(features, torch.randint(CLASSES, (ROWS,))), batch_size=8)
    variances = []
    for omega in PRIOR_VARIANCES:
        laplace = Laplace(
            torch.nn.Sequential(torch.nn.Flatten(), head), "classification", subset_of_weights="all",
            hessian_structure="kron", prior_precision=1 / omega,
        )  # fmt: skip
        laplace.fit(rows)
        variances.append(laplace._glm_predictive_distribution(new)[1])
    (rows_g, a), _ = laplace.H_facs.kfacs  # of the weights: N G and A; of the bias: N G again
    values = {
        "versions": {n: version(n) for n in ("laplace-torch", "curvlinops-for-pytorch", "torch")},
        "features": features.tolist(),
        "logits": head(features).tolist(),
        "new_features": new.tolist(),
        "A": a.tolist(),
        "G": (rows_g / ROWS).tolist(),
        "prior_variances": PRIOR_VARIANCES,
        "functional_variances": [v.tolist() for v in variances],
    }
    target = Path(__file__).with_name("laplace_torch.json")
    target.write_text(json.dumps(values) + "\n", encoding="utf-8")
    sys.stdout.write(f"{target.name}: {values['versions']}\n")


if __name__ == "__main__":
    main()
