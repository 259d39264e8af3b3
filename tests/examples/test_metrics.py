"""Accuracy and F against numbers worked by hand."""

import math

import pytest
import torch

from faceparse.reporting.metrics import accuracy, confusion_matrix, f_measures


def test_confusion_matrix_has_truth_in_rows():
    labels = torch.tensor([[0, 0, 1], [1, 2, 2]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1], [1, 2, 0]], dtype=torch.uint8)
    matrix = confusion_matrix(predicted, labels, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert matrix.dtype == torch.int64


def test_accuracy_and_f_are_as_worked_by_hand():
    matrix = torch.tensor([[1, 1, 0], [0, 2, 0], [1, 0, 1]])
    assert accuracy(matrix) == pytest.approx(4 / 6)
    # class 0: TP 1, FP 1, FN 1; class 1: TP 2, FP 1, FN 0; class 2: TP 1, FP 0, FN 1
    assert f_measures(matrix) == pytest.approx([2 / 4, 4 / 5, 2 / 3])


def test_f_of_a_class_that_never_occurs_is_nan():
    f = f_measures(torch.tensor([[3, 0], [0, 0]]))
    assert f[0] == 1
    assert math.isnan(f[1])


def test_confusion_matrix_does_not_overflow_uint8():
    labels = torch.full((300,), 10, dtype=torch.uint8)
    matrix = confusion_matrix(labels, labels, 30)
    assert matrix[10, 10] == 300
    assert matrix.sum() == 300
