"""The face parser of the paper: data, models, training, inference, reporting."""

import importlib.util

_NEEDED = {"cv2": "opencv-python-headless", "numpy": "numpy", "PIL": "pillow", "tqdm": "tqdm"}
_MISSING = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
if _MISSING:
    raise ImportError(
        f"{', '.join(_MISSING)} is not installed: in the checkout, pip install -e '.[face-parsing]'"
    )
