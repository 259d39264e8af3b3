"""From a photograph to the classes of a face in its own frame.

    parser = FaceParser.load("runs/face-parser")
    parsed_face = parser(image_io.read("photo.jpg"))
    parsed_face.labels                  # (H, W) uint8, indices into parser.names

Detect, find five key points, align, first stage, second stage, compose: each step is a method, and
``face_crops.py`` has the geometry.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from faceparse.data import COARSE, LABEL_SETS, geometry
from faceparse.data.labels import POINTS
from faceparse.models import MODELS, PartsParser, build_model, fuse_bn
from faceparse.training import checkpoint
from faceparse.training.checkpoint import CheckpointError

from . import detect, face_crops
from .face_crops import PARTS, Layout, parts_of
from .image_io import NoFaceError, as_tensor

FILE = "face_parser.pt"
KIND = "gatedrnn face parser with two stages, version 2"
STRIP = 1 << 20  # pixels composed at a time, so that memory does not grow with the photograph
# Pixels, of what is given in a photograph: from its corner, and of points from one another.
FARTHEST, NEAREST = 1e6, 1e-6
BATCH = 16  # faces at a time, so that memory does not grow with their number
# Misfits of key points. Above the first they are also looked for in the face turned upside down;
# above the second there is no face. Of 60 upright portraits the largest was 0.17.
UNSURE, WRONG = 0.1, 0.2
# Of key points, in sides of the detector's box; less is no face. Usual is 0.24 (see BOX_SIDE).
SMALLEST = 0.19
HALF_TURN = np.array([[-1.0, 0, face_crops.BOX_SIZE[1]], [0, -1, face_crops.BOX_SIZE[0]]])
PASSES = 2  # of the key points: the second looks at the face turned upright, at its place


def networks_of(label_set):
    """The names of the networks that give these classes in two stages."""
    return ("points", "face", *parts_of(label_set))


def pictures_of(name):
    """What the second stage is shown of a part: its name, and whether the face is mirrored."""
    return [(name, mirrored) for mirrored in (False, True)[: 1 + PARTS[name].two_sided]]


def class_counts(name, label_set):
    """How many classes a network may have, one or two numbers."""
    if name == "points":
        return (len(POINTS),)
    if name == "face":
        return (len(COARSE.names), len(label_set.names))
    return (len(PARTS[name].names) + 1,)


class ParsedFace:
    """One parsed face.

    Attributes:
        label_set: ``data.LabelSet`` of its labels.
        points: (5, 2) float32, the key points, in the order of ``data.labels.POINTS``.
        box: (4,) float32, x, y, width and height of the detected or given box; NaN where the points
            were given.
    """

    def __init__(self, size, points, box, maps, label_set):
        self.size, self.points, self.box, self.label_set = size, points, box, label_set
        self._maps = maps  # [(map from the photograph, log scores (C, h, w), classes)]: base first
        self._found = list(self._labels())

    @property
    def labels(self):
        """(H, W) uint8, the class of each pixel of the photograph; 0 beyond the face's frame.

        Made when asked for: a photograph can have many faces, and this is as large as it.
        """
        labels = torch.zeros(self.size, dtype=torch.uint8)
        self.paint(labels)
        return labels

    def paint(self, labels):
        """Put the face into the labels (H, W) of a photograph; its background covers nothing."""
        for (left, top, right, bottom), found in self._found:
            under = labels[top:bottom, left:right]
            under.copy_(torch.where(found != 0, found, under))

    def pixels(self):
        """(classes,) int64, how many pixels of the photograph each class has."""
        counts = torch.zeros(len(self.label_set.names), dtype=torch.int64)
        for _, found in self._found:
            counts += torch.bincount(found.flatten(), minlength=len(counts))
        counts[0] += math.prod(self.size) - counts.sum()
        return counts

    @functools.cached_property
    def scores(self):
        """(C, H, W) float32: the share of each class in each pixel; made when first asked for."""
        return self.score(*self.label_set.names, apart=True)

    def score(self, *names, apart=False):
        """The share of some classes together in each pixel, (H, W) float32; a soft mask.

        Args:
            names: of classes.
            apart: (len(names), H, W) instead.
        """
        known = self.label_set.names
        for name in names:
            if name not in known:
                raise ValueError(f"class must be one of {', '.join(known)}, got {name!r}")
        if not apart:
            names = dict.fromkeys(names)  # one that is named twice is still one
        wanted = [known.index(name) for name in names]
        result = torch.zeros(len(wanted) if apart else 1, *self.size)
        if 0 in wanted:
            result[wanted.index(0) if apart else 0] = 1
        for box in self._strips():
            odds = torch.full((len(known), box[3] - box[1], box[2] - box[0]), -torch.inf)
            for inside, classes, logs in self._seen(box):
                left, top, right, bottom = (v - box[i % 2] for i, v in enumerate(inside))
                odds[list(classes), top:bottom, left:right] = logs
            shares = odds.softmax(0)[wanted]
            result[:, box[1] : box[3], box[0] : box[2]] = shares if apart else shares.sum(0)
        return result if apart else result[0]

    def _labels(self):
        """Boxes that cover the face's frame, and the labels in each."""
        for box in self._strips():
            left, top, right, bottom = box
            best = torch.full((bottom - top, right - left), -torch.inf)
            found = torch.zeros(best.shape, dtype=torch.uint8)
            for inside, classes, logs in self._seen(box):
                rows = slice(inside[1] - top, inside[3] - top)
                columns = slice(inside[0] - left, inside[2] - left)
                best_here, found_here = best[rows, columns], found[rows, columns]
                for label, score in zip(classes, logs, strict=True):  # faster than max and index
                    found_here.masked_fill_(score > best_here, label)
                    torch.maximum(best_here, score, out=best_here)
            yield box, found

    def _strips(self):
        """Boxes (left, top, right, bottom) that cover the face's frame in the photograph."""
        left, top, right, bottom = _inside(self._maps[0], (0, 0, self.size[1], self.size[0]))
        if left < right:
            rows = max(1, STRIP // (right - left))
            for start in range(top, bottom, rows):
                yield left, start, right, min(start + rows, bottom)

    def _seen(self, box):
        """Each map's part in a box of the photograph: the smaller box, classes, log scores."""
        for entry in self._maps:
            inside = _inside(entry, box)
            if inside[0] < inside[2] and inside[1] < inside[3]:
                m, logs, classes = entry
                shift = np.array([[1.0, 0, -inside[0]], [0, 1, -inside[1]]])
                size = inside[3] - inside[1], inside[2] - inside[0]
                back = geometry.compose(shift, geometry.inverse(m))
                yield inside, classes, geometry.view(logs, back, size)


def _inside(entry, box):
    """What of a box of the photograph a map can cover."""
    m, logs, _ = entry
    shown = geometry.shown_box(m, logs.shape[-2:])
    low = [max(a, b) for a, b in zip(box[:2], shown[:2], strict=True)]
    high = [min(a, b) for a, b in zip(box[2:], shown[2:], strict=True)]
    return (*low, *high)


class FaceParser:
    """The two stages, and what goes before them.

    Args:
        networks: :func:`networks_of` the label set by name, ready to evaluate. Without those of the
            parts, and with all classes in "face", the first stage does it all. The parts' are
            copied.
        layout: ``face_crops.Layout``.
        labels: the classes, a key of ``LABEL_SETS``.
        detector: a function of an array (H, W, 3) uint8 to boxes, the largest first; None for
            OpenCV's cascade, opened when first needed.
    """

    def __init__(self, networks, layout, *, labels="fine", detector=None):
        self.networks, self.layout = networks, layout
        self.labels, self.label_set = labels, LABEL_SETS[labels]
        self.names = self.label_set.names
        parts = [name for name in parts_of(self.label_set) if name in networks]
        self._shown = [shown for name in parts for shown in pictures_of(name)]
        self._sizes = [PARTS[name].size for name, _ in self._shown]
        for name in parts:
            (wanted,), given = class_counts(name, self.label_set), networks[name].classes
            if name not in layout.boxes:
                raise ValueError(f"layout must have a box of the part '{name}'")
            if given != wanted:
                raise ValueError(f"network '{name}' must have {wanted} classes, got {given}")
        if self._shown:
            shown = [networks[name] for name, _ in self._shown]
            self.parts = PartsParser(shown, self._sizes).to(self.device)
        self._detector = detector

    @classmethod
    def load(cls, folder, *, device="cpu"):
        """The parser that ``train.py --all`` left in a folder.

        Raises:
            checkpoint.CheckpointError: there is none, or it cannot be used; names the file.
        """
        device = torch.device(device)
        path = Path(folder) / FILE
        if not path.is_file():
            raise CheckpointError(
                f"no face parser at {path}: train.py --all --out {folder} makes one"
            )
        stored = checkpoint.read(path, KIND)
        try:
            networks, labels = {}, stored.get("labels", "fine")
            for name, (model, classes, side, weights) in stored["networks"].items():
                known = {"points": ("points",), "face": MODELS}.get(name, ("part",))
                fits = model in known and side == (face_crops.SIDE if name == "face" else 64)
                if not fits or classes not in class_counts(name, LABEL_SETS[labels]):
                    raise ValueError((model, classes, side))
                networks[name] = build_model(model, classes, side=side)
                networks[name].load_state_dict(weights)
            if wrong := {"points", "face"} - networks.keys():
                raise KeyError(wrong)
            if wrong := networks.keys() - networks_of(LABEL_SETS[labels]):
                raise KeyError(wrong)
            layout = Layout.of(stored["layout"])
            return cls.of(networks, layout, labels=labels, device=device)
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
            raise CheckpointError(f"{path} holds no face parser that this program knows") from None

    @classmethod
    def of(cls, networks, layout, *, labels="fine", device="cpu"):
        """A parser of trained networks, batch normalisation folded into the convolutions."""
        networks = {name: fuse_bn(net.eval()).to(device) for name, net in networks.items()}
        return cls(networks, layout, labels=labels)

    @property
    def device(self):
        return next(self.networks["face"].parameters()).device

    def __call__(self, image, *, points=None, box=None):
        """Parse the largest face that is found in a photograph, or in each of a list.

        Args:
            image: see ``image_io.as_tensor``; or a list of such.
            points: (5, 2), the key points, where they are known; of a list, a list.
            box: x, y, width and height of the face, where that is known; of a list, a list.

        Returns:
            :class:`ParsedFace`; of a list, a list, in which None stands for no face.

        Raises:
            NoFaceError: of a single photograph.
        """
        if isinstance(image, list):
            images = [as_tensor(one) for one in image]
            given = [
                _as_list(v, len(images), name) for v, name in ((points, "points"), (box, "box"))
            ]
            return self._parse_each(images, *given)
        (parsed_face,) = self._parse_each([as_tensor(image)], [points], [box])
        if parsed_face is None:
            raise NoFaceError("no face found")
        return parsed_face

    def all_faces(self, image):
        """:class:`ParsedFace` of every face that the detector finds.

        The first is the one that is parsed alone.
        """
        image = as_tensor(image)
        boxes = self.detect(image, everyone=True)
        points = self.find_points([image] * len(boxes), boxes)
        good = [self._is_face(p, box) for p, box in zip(points, boxes, strict=True)]
        return self.parse([image] * sum(good), points[good], boxes[good])

    def _parse_each(self, images, points, boxes):
        points = [None if p is None else _checked(p, (5, 2), "points") for p in points]
        boxes = [None if b is None else _checked(b, (4,), "box") for b in boxes]
        others = {}  # of what is detected, the smaller boxes
        for i, image in enumerate(images):
            if points[i] is None and boxes[i] is None:
                boxes[i], *others[i] = [*self.detect(image)] or [None]
        missing = [i for i, p in enumerate(points) if p is None and boxes[i] is not None]
        found = self.find_points([images[i] for i in missing], [boxes[i] for i in missing])
        for i, p in zip(missing, found, strict=True):
            while p is not None and not self._is_face(p, boxes[i] if i in others else None):
                boxes[i], *others[i] = others.get(i) or [None]
                p = None if boxes[i] is None else self.find_points([images[i]], [boxes[i]])[0]
            points[i] = p
        known = [i for i, p in enumerate(points) if p is not None]
        nowhere = np.full(4, np.nan)
        parsed = self.parse(
            [images[i] for i in known],
            [points[i] for i in known],
            [nowhere if boxes[i] is None else boxes[i] for i in known],
        )
        result = [None] * len(images)
        for i, parsed_face in zip(known, parsed, strict=True):
            result[i] = parsed_face
        return result

    def detect(self, image, *, everyone=False):
        """Boxes (M, 4) of the faces in an image (3, H, W) uint8; of one size, the largest first.

        Small faces next to a large one are sought only if ``everyone`` is set, and come last.
        """
        if self._detector is None:
            self._detector = detect.open_detector()
        return detect.detect_reduced(
            detect.as_array(image), detector=self._detector, everyone=everyone
        )

    def _is_face(self, points, box):
        """Whether the key points that were found can be those of a face.

        Args:
            box: the detector's, which a face must fill; None for one that a person gives.
        """
        size = np.sqrt(((points - points.mean(0)) ** 2).sum(1).mean())
        fills = box is None or size >= SMALLEST * max(box[2:])
        return bool(fills and face_crops.misfit(points, self.layout) <= WRONG)

    def find_points(self, images, boxes):
        """The key points (N, 5, 2) in images (3, H, W) uint8, from a rough box (4,) in each.

        The face may be upside down.
        """
        found = [self._find_points(*rows) for rows in _batches(images, boxes)]
        return np.concatenate(found or [np.zeros((0, len(POINTS), 2))])

    def _find_points(self, images, boxes):
        maps = [face_crops.box_of(box) for box in boxes]
        points = self._look(images, maps)
        off = face_crops.misfit(points, self.layout)
        for i in np.flatnonzero(~(off < UNSURE)):  # NaN too
            (turned,) = self._look([images[i]], [geometry.compose(HALF_TURN, maps[i])])
            if not face_crops.misfit(turned, self.layout) > off[i]:
                points[i] = turned
        return points

    @torch.inference_mode()
    def _look(self, images, maps):
        """The key points (N, 5, 2) from images and maps to where the face is about upright."""
        for _ in range(PASSES):
            pictures = [
                geometry.view(image, m, face_crops.BOX_SIZE)[None]
                for image, m in zip(images, maps, strict=True)
            ]
            seen = self.networks["points"](self._input(pictures)).points.double().cpu().numpy()
            seen = seen * face_crops.BOX_SIZE[::-1]
            back = geometry.inverse(np.stack(maps))
            points = geometry.apply(back, seen)
            maps = [face_crops.box_again(p, self.layout) for p in points]
        return points

    def parse(self, images, points, boxes):
        """Both stages: a :class:`ParsedFace` for each image (3, H, W) and its points (5, 2)."""
        batches = _batches(images, points, boxes)
        return [parsed_face for rows in batches for parsed_face in self._parse(*rows)]

    @torch.inference_mode()
    def _parse(self, images, points, boxes):
        faces = [Aligned(image, p, self.layout) for image, p in zip(images, points, strict=True)]
        pictures = [
            face.pictures([face_crops.FRAME_TO_FACE], [(face_crops.SIDE, face_crops.SIDE)])
            for face in faces
        ]
        logits = self.networks["face"](self._input(pictures)).logits
        given = COARSE.names if logits.shape[1] == len(COARSE.names) else self.names
        classes = [self.names.index(name) for name in given]
        layers = [
            [(geometry.compose(face_crops.FRAME_TO_FACE, face.frame), logs, classes)]
            for face, logs in zip(faces, logits.float().log_softmax(1).cpu(), strict=True)
        ]
        if self._shown:
            self._add_parts(faces, layers)
        return [
            ParsedFace(tuple(image.shape[1:]), _float(p), _float(box), layer, self.label_set)
            for image, p, box, layer in zip(images, points, boxes, layers, strict=True)
        ]

    def _add_parts(self, faces, layers):
        """What the second stage says of the parts, to each face's layers: see ``ParsedFace``."""
        maps = [[self._place(face, *shown) for shown in self._shown] for face in faces]
        pictures = [
            face.pictures(m, self._sizes).flatten(0, 1)[None]
            for face, m in zip(faces, maps, strict=True)
        ]
        logits = self.parts(self._input(pictures))
        for k, (name, mirrored) in enumerate(self._shown):
            scores = logits[k].float().cpu()
            scores = scores[:, 1:] - scores[:, :1]
            classes = [self.names.index(one) for one in PARTS[name].classes]
            if mirrored:
                classes = [self.label_set.mirror[one] for one in classes]
            for i, face in enumerate(faces):
                layers[i].append((geometry.compose(maps[i][k], face.frame), scores[i], classes))

    def _place(self, face, name, mirrored):
        """The map from a face's frame to a picture of :func:`pictures_of`."""
        if not mirrored:
            return face_crops.part_in_frame(face.points, self.layout, name)
        points = face_crops.mirrored_points(face.points, face_crops.FRAME)
        m = face_crops.part_in_frame(points, self.layout, name)
        return geometry.compose(m, geometry.mirror(face_crops.FRAME))

    def _input(self, pictures):
        """What a network takes, (N, C, h, w) float32 in -0.5 .. 0.5, from parts of a batch."""
        pictures = pictures[0] if len(pictures) == 1 else torch.cat(pictures)
        pictures = (pictures * (1 / 255)).sub_(0.5)
        return pictures.to(self.device).contiguous(memory_format=torch.channels_last)


class Aligned:
    """A face's part of a photograph, about as fine as the networks' pictures, and its frame.

    Attributes:
        points: (5, 2), in the aligned frame.
        frame: the map from the photograph to that frame.
    """

    def __init__(self, image, points, layout):
        self.frame = face_crops.frame_of(points, layout)
        self.points = geometry.apply(self.frame, points)
        finest = max(PARTS[name].size[0] / box[3] for name, box in layout.boxes.items())
        by = geometry.reduction_of(image, self.frame, finest=finest)
        size = (face_crops.FRAME, face_crops.FRAME)
        self._patch, to_image = geometry.window(image, self.frame, size, reduction=by)
        self._from_patch = geometry.compose(self.frame, to_image)

    def pictures(self, maps, sizes):
        """Pictures (N, 3, H, W) float32 by maps from the frame.

        Args:
            maps: (2, 3) each.
            sizes: h, w of each. H, W are the largest; beyond a smaller picture lies anything.
        """
        maps = [geometry.compose(m, self._from_patch) for m in maps]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        if all(geometry.reduction_of(self._patch, m) == 1 for m in maps):
            return geometry.pictures(self._patch, np.stack(maps), (height, width))
        # Averaged one by one: what is averaged depends on where a picture ends.
        shown = [geometry.view(self._patch, m, size) for m, size in zip(maps, sizes, strict=True)]
        return torch.stack(
            [F.pad(v, (0, width - v.shape[2], 0, height - v.shape[1])) for v in shown]
        )


def save(folder, states, *, labels="fine"):
    """Write a parser made of trainings, atomically; returns the file's path.

    Args:
        states: ``checkpoint.load`` of each of :func:`networks_of` the label set, by name.
        labels: the classes, a key of ``LABEL_SETS``.

    Raises:
        CheckpointError: they are of different data, so that their geometry differs.
    """
    layout = dict(states["face"]["layout"])
    for name, state in states.items():
        for key, value in state["layout"].items():  # a part's own box may be there only
            if layout.setdefault(key, value) != value:
                raise CheckpointError(f"the trainings 'face' and '{name}' are of different data")
    networks = {
        name: (state["settings"]["model"], len(state["classes"]), state["side"], state["average"])
        for name, state in states.items()
    }
    path = Path(folder) / FILE
    checkpoint.write(path, KIND, {"layout": layout, "labels": labels, "networks": networks})
    return path


def _batches(*columns):
    """At most ``BATCH`` rows of the columns at a time."""
    rows = list(zip(*columns, strict=True))
    for start in range(0, len(rows), BATCH):
        yield zip(*rows[start : start + BATCH], strict=True)


def _float(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


def _checked(values, shape, name):
    """An array of finite numbers in a shape, in pixels that a photograph may have."""
    try:
        array = np.asarray(values, float)
        good = array.shape == shape and (abs(array) <= FARTHEST).all()  # nor NaN
    except (TypeError, ValueError, OverflowError):  # of unequal lengths, no numbers
        good = False
    if not good:
        raise ValueError(f"{name} must be {shape} numbers, pixels of the image, got {values!r}")
    if name == "points" and np.ptp(array, axis=0).max() < NEAREST:
        raise ValueError(f"points must not all be in one place, got {values!r}")
    if name == "box" and (array[2:] < 1).any():
        raise ValueError(f"box must be x, y and a width and height of a pixel, got {values!r}")
    return array


def _as_list(values, count, name):
    if values is None:
        return [None] * count
    if not hasattr(values, "__len__") or len(values) != count:
        given = len(values) if hasattr(values, "__len__") else repr(values)
        raise ValueError(f"{name} must be one for each of {count} images, got {given}")
    return list(values)
