"""Make the files of this example from the full model and data set.

    python examples/hippocampus/make_example.py ../shared

The source folder holds ``models/Dataset004_Hippocampus`` (a trained nnU-Net with its NOTICE) and
``data/Dataset004_Hippocampus`` (raw nnU-Net layout with ``splits_final.json`` and NOTICE). Two runs on the
same source and the same torch give the same bytes.

The cases are the first ten of the validation list of fold 0, so none was seen in training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

DATASET = "Dataset004_Hippocampus"
MODEL = f"{DATASET}/nnUNetTrainer__nnUNetPlans__3d_fullres"
FOLD = 0
CASES = 10
MADE = ("NOTICE", "dataset.json", "cases.json", "images", "labels", "model")

CHANGES = f"""
Changes made for this example:
- images/ and labels/ hold the first {CASES} cases of the validation list of fold {FOLD}, bytes unchanged.
- model/ holds an nnU-Net trained on that data (its NOTICE is the text above too); its weights were rounded
  from float32 to float16 and everything that only training needs was dropped from the checkpoint.
Whoever passes these files on does so under CC BY-SA 4.0 and keeps this notice. The licence of the program
code in this repository does not apply to them.
"""


def half_precision_checkpoint(source: Path) -> dict:
    """Checkpoint with fp16 weights and without training state, loadable by the stock predictor.

    nnU-Net registers each convolution under several names. Names that shared one tensor share one again, so
    that the file holds every weight once; ``load_state_dict`` casts back to the network's fp32.
    """
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    halved: dict[int, torch.Tensor] = {}
    weights = {}
    for name, tensor in checkpoint["network_weights"].items():
        half = halved.setdefault(tensor.data_ptr(), tensor.half())
        if half.shape != tensor.shape:
            raise ValueError(f"{name} shares memory with a tensor of another shape, {tuple(half.shape)}")
        if not torch.isfinite(half).all():
            raise ValueError(f"{name} does not fit into float16")
        weights[name] = half
    kept = ("current_epoch", "init_args", "trainer_name", "inference_allowed_mirroring_axes")
    state = {"optimizer_state": None, "grad_scaler_state": None}
    return {"network_weights": weights, **state, **{key: checkpoint[key] for key in kept}}


def make(source: Path, target: Path) -> None:
    """Write every file of the example into the existing folder ``target``."""
    data, model = source / "data" / DATASET, source / "models" / MODEL
    cases = json.loads((data / "splits_final.json").read_text())[FOLD]["val"][:CASES]

    for folder in ("images", "labels"):
        (target / folder).mkdir()
    for case in cases:
        shutil.copyfile(data / "imagesTr" / f"{case}_0000.nii.gz", target / "images" / f"{case}_0000.nii.gz")
        shutil.copyfile(data / "labelsTr" / f"{case}.nii.gz", target / "labels" / f"{case}.nii.gz")
    rule = f"first {CASES} cases of the validation list of fold {FOLD} in splits_final.json"
    listing = json.dumps({"fold": FOLD, "rule": rule, "cases": cases}, indent=1)
    (target / "cases.json").write_text(listing + "\n")
    shutil.copyfile(data / "dataset.json", target / "dataset.json")
    (target / "NOTICE").write_text((data / "NOTICE").read_text().rstrip("\n") + "\n" + CHANGES)

    fold = target / "model" / MODEL / f"fold_{FOLD}"
    fold.mkdir(parents=True)
    for name in ("dataset.json", "plans.json", "dataset_fingerprint.json"):
        shutil.copyfile(model / name, target / "model" / MODEL / name)
    checkpoint = half_precision_checkpoint(model / f"fold_{FOLD}" / "checkpoint_final.pth")
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    shutil.copyfile(target / "NOTICE", target / "model" / DATASET / "NOTICE")


def main() -> None:
    here = Path(__file__).resolve().parent
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("source", type=Path, help="folder that holds models/ and data/")
    parser.add_argument("-o", "--output", type=Path, default=here, help="default: here")
    parser.add_argument("--force", action="store_true", help="replace files that an earlier run has made")
    args = parser.parse_args()

    existing = [name for name in MADE if (args.output / name).exists()]
    if existing and not args.force:
        parser.error(f"{args.output} holds {', '.join(existing)} already; pass --force to replace them")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output, prefix=".making-") as temporary:
        make(args.source, Path(temporary))
        for name in MADE:
            old = args.output / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            (Path(temporary) / name).rename(old)


if __name__ == "__main__":
    main()
