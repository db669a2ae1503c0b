"""scikit-learn's own tests, of StandardScaler and of estimators, on fastbn's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from helpers import run_python

sklearn = pytest.importorskip("sklearn", reason="needs the extra fastbn[sklearn]")

from sklearn import preprocessing  # noqa: E402
from sklearn.exceptions import SkipTestWarning  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks  # noqa: E402

import fastbn  # noqa: E402
from fastbn.sklearn import StandardScaler  # noqa: E402

MODULES = [
    "sklearn.preprocessing.tests.test_data",
    "sklearn.preprocessing.tests.test_common",
    "sklearn.preprocessing.tests.test_function_transformer",
    "sklearn.tests.test_pipeline",
    "sklearn.tests.test_base",
    "sklearn.tests.test_calibration",
    "sklearn.tests.test_discriminant_analysis",
    "sklearn.tests.test_metaestimators",
    "sklearn.compose.tests.test_column_transformer",
    "sklearn.compose.tests.test_target",
    "sklearn.utils.tests.test_set_output",
]
# What fails, which is to fail as long as it is named here: the functions whose cases with a sparse
# container in the id do, with how many, and the others, which try sparse data within.
SPARSE_CASES = {
    "test_partial_fit_sparse_input": 8,
    "test_scale_sparse_with_mean_raise_exception": 4,
    "test_scaler_int": 4,
    "test_scaler_n_samples_seen_with_nan": 8,
    "test_scaler_return_identity": 4,
    "test_scaler_without_centering": 8,
    "test_scaler_without_copy": 4,
    "test_standard_scaler_constant_features": 48,
    "test_standard_scaler_dtype": 8,
    "test_standard_scaler_near_constant_features": 72,
    "test_standard_scaler_partial_fit_numerical_stability": 4,
    "test_standard_scaler_sample_weight": 6,
}
REFUSED = "TypeError: X: expected dense data, got a sparse "
LEFT_OUT = {
    "test_standard_scaler_sparse_partial_fit_finite_variance[X_20]": REFUSED,
    "test_standard_scaler_sparse_partial_fit_finite_variance[X_21]": REFUSED,
    "test_standard_scaler_sparse_partial_fit_finite_variance[X_22]": REFUSED,
    # The same data as a sparse matrix, for the estimator that does not centre.
    "test_missing_value_handling[est3-scale-True-False-omit_kwargs3]": REFUSED,
    # A text vectorizer's matrix.
    "test_meta_estimators_delegate_data_validation[FeatureUnion]": REFUSED,
    # The tag says what is so: arrays of other libraries become NumPy's.
    "test_feature_union_array_api_support_tag": "AssertionError: assert False is True",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{test: [module, outcome, error]} of a process in which scikit-learn's class is replaced."""
    if importlib.util.find_spec("sklearn.preprocessing.tests.test_data") is None:
        pytest.skip("scikit-learn was installed without its tests")
    if tuple(map(int, sklearn.__version__.split(".")[:2])) != (1, 9):
        pytest.skip(
            f"the list of sparse cases is that of scikit-learn 1.9, not {sklearn.__version__}"
        )
    folder = tmp_path_factory.mktemp("swapped")
    settings, report = folder / "pytest.ini", folder / "report.json"
    settings.write_text("[pytest]\n", encoding="utf-8")
    options = ["-c", str(settings), "-q", "--tb=no", "-p", "no:cacheprovider", "--pyargs", *MODULES]
    here = [Path(__file__).parent, Path(fastbn.__file__).parents[1]]
    done = run_python(
        f"import pytest; pytest.main(['-p', 'swapped_scaler', *{options!r}])",
        timeout=600,
        PYTHONPATH=os.pathsep.join(map(str, here)),
        REPORT=str(report),
    )
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text(encoding="utf-8"))


def function_of(name):
    return name.partition("[")[0]


def test_of_scikit_learn_pass_but_for_sparse_data(outcomes):
    failed = {name: error for name, (_, what, error) in outcomes.items() if what == "failed"}
    counted = dict.fromkeys(SPARSE_CASES, 0)
    for name, error in failed.items():
        if function_of(name) in SPARSE_CASES and re.search(r"cs[rc]", name):
            assert error.startswith(REFUSED), (name, error)
            assert "sklearn.preprocessing.StandardScaler" in error
            counted[function_of(name)] += 1
        else:
            assert error.startswith(LEFT_OUT.get(name, "none expected")), (name, error)
    assert counted == SPARSE_CASES
    assert sorted(LEFT_OUT) == sorted(n for n in failed if function_of(n) not in SPARSE_CASES)


def test_enough_of_them_ran(outcomes):
    passed = {name: module for name, (module, what, _) in outcomes.items() if what == "passed"}
    assert len(passed) >= 170
    # The one of test_metaestimators is in LEFT_OUT.
    assert set(passed.values()) == set(MODULES) - {"sklearn.tests.test_metaestimators"}
    # Each function whose sparse cases fail has dense ones that pass, or has no others.
    rest = set(SPARSE_CASES) - {function_of(name) for name in passed}
    assert rest == {
        "test_partial_fit_sparse_input",
        "test_scale_sparse_with_mean_raise_exception",
        "test_scaler_int",
        "test_scaler_return_identity",
        "test_scaler_without_centering",
        "test_scaler_without_copy",
        "test_standard_scaler_partial_fit_numerical_stability",
    }


@parametrize_with_checks(
    [StandardScaler(), StandardScaler(with_mean=False), StandardScaler(with_std=False)]
)
@pytest.mark.filterwarnings("default")
def test_estimator_checks(estimator, check):
    check(estimator)


def failing(estimator):
    with pytest.warns(SkipTestWarning):
        results = check_estimator(estimator, on_fail=None, on_skip="warn")
    return {r["check_name"] for r in results if r["status"] == "failed"}


@pytest.mark.filterwarnings("default")
def test_copy_false_fails_the_check_that_scikit_learn_fails():
    """It compares with an X that the transformer has overwritten."""
    theirs = failing(preprocessing.StandardScaler(copy=False))
    assert (
        failing(StandardScaler(copy=False)) == theirs == {"check_methods_sample_order_invariance"}
    )
