"""`osteogate evaluate | models`: model packages, judged and in force."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli.shared import add_command, numbers, open_store, site_policy, who_types
from service.settings import Settings

if TYPE_CHECKING:
    from models.evaluation import Definition
    from service.domain.policy import Policy
    from service.workflow.models import ModelLine


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    evaluate = add_command(commands, "evaluate", run_evaluate, "evaluate a model package on a cohort")
    evaluate.add_argument("--model", required=True, metavar="PACKAGE", help="a folder, an id, or 'active'")
    evaluate.add_argument("--cohort", type=Path, required=True, metavar="DIR")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")
    evaluate.add_argument(
        "--comparators-from", type=Path, metavar="DIR", help="a cohort to fit the comparators on (else cross-fitted)"
    )
    models = commands.add_parser("models", help="model packages").add_subparsers(required=True, metavar="ACTION")
    _add_registry(models)


def _add_registry(models: Any) -> None:
    add_command(models, "list", run_models_list, "the models at hand, the one in force first")
    show = add_command(models, "show", run_models_show, "one model's card, and what the gate says of it")
    bring = add_command(models, "import", run_models_import, "take a package that another site exported")
    bring.add_argument("file", type=Path, metavar="FILE")
    export = add_command(models, "export", run_models_export, "write a model with its reports for another site")
    judge = add_command(models, "judge", run_models_judge, "evaluate a model beside the one in force, and ask the gate")
    for command in (show, export, judge):
        command.add_argument("model", metavar="PACKAGE", help="an id, a name with version, or a hash's beginning")
    export.add_argument("--out", type=Path, required=True, metavar="FILE")
    judges = judge.add_mutually_exclusive_group(required=True)
    judges.add_argument("--cohort", type=Path, metavar="DIR", help="patients whom neither learned from")
    judges.add_argument("--run", type=int, metavar="N", help="the locked patients of this training run, cut anew")
    judge.add_argument("--folds", type=numbers, metavar="F[,F]...", help="these tenths of the cohort only")
    promote = add_command(models, "promote", run_models_promote, "put a model that passed the gate in force")
    promote.add_argument("model", metavar="PACKAGE")
    back = add_command(models, "rollback", run_models_rollback, "bring back the model that was in force before")
    for command in (promote, back):
        command.add_argument("--reason", required=True, metavar="TEXT")
        command.add_argument("--person", metavar="NAME", help="who stands for it, if that is not who types")


def run_evaluate(options: argparse.Namespace) -> int:
    """`osteogate evaluate`."""
    from models.evaluation import evaluate_package

    settings = Settings()
    definitions = definitions_of(options.cohort, site_policy(settings))
    package = package_folder(options.model, settings)
    report = evaluate_package(package, options.cohort, options.out, definitions, options.comparators_from)
    print(json.dumps(report["per_vertebra"], indent=2))
    print(options.out / "report.html")
    return 0


def _locked_patients(run_id: int, settings: Settings, folder: Path) -> Path:
    """The cohort that judged a training run, cut anew from the stored CTs into `folder`.

    Raises:
        ValueError: there is no such run, or nothing of it is left.
    """
    from service.domain.splits import Part
    from service.workflow import training
    from worker.cohorts import cohort_dir, make_judges

    with open_store(settings).reading() as session:
        run, manifest = training.run(session, run_id), training.manifest(session, run_id)
    if run is None or manifest is None:
        raise ValueError(f"no training run {run_id}")
    for lost in make_judges(manifest, run.manifest_sha256, settings, folder):
        print(f"left out: {lost.study_uid} {lost.level or ''} {lost.code}: {lost.text}", file=sys.stderr)
    return cohort_dir(folder, Part.LOCKED)


def definitions_of(cohort: Path, policy: Policy) -> dict[str, Definition] | None:
    """Who of a cohort has what: by the policy's criteria, for digital patients beside digital young adults."""
    from models.evaluation import Definition
    from service.domain.bone import load_references
    from service.domain.criteria import definitions

    provenance = json.loads((cohort / "cohort.json").read_text(encoding="utf-8")).get("provenance")
    digital = definitions(policy.referral.profile, load_references().digital_young_adults())
    told = digital if provenance == "digital" else policy.definitions
    return {name: Definition.from_dict(one) for name, one in told.items()} or None


def package_folder(told: str, settings: Settings) -> Path:
    """The package that a person means: a folder, or one of the installation's, or one that ships.

    Raises:
        ValueError: there is none.
    """
    from service.workflow import models
    from service.workflow.model import has_registry
    from service.workflow.packages import Library

    if (Path(told) / "manifest.json").is_file():
        return Path(told)
    if has_registry(settings):
        with open_store(settings).transaction() as session:
            models.enrol_shipped(session, who_types().now)
            return models.folder(session, models.find(session, told), Library.of(settings))
    from worker.start import package_path  # it loads torch, which the service's image has not

    return package_path(told, settings)


def run_models_list(_: argparse.Namespace) -> int:
    """`osteogate models list`: without an installation the packages that ship."""
    from service.workflow import models
    from service.workflow.clock import utc_now
    from service.workflow.model import has_registry

    settings = Settings()
    if not has_registry(settings):
        from worker.start import packages

        for package in packages():
            print(f"{package.name}  {package.path}")
        return 0
    with open_store(settings).transaction() as session:
        found = models.registry(session, utc_now())
    for model in found.models:
        print(f"{model.id}  {model.name}  {model.sha256[:12]}  {model.origin}  {_standing(model)}")
    return 0


def _standing(model: ModelLine) -> str:
    """Where a model stands, in a word or two."""
    if model.in_force:
        return "in force"
    if model.verdict is None:
        return "not judged here"
    return "passed the gate" if model.promotable else "gate shut: " + ", ".join(_codes(model))


def _codes(model: ModelLine) -> list[str]:
    return sorted({reason.code.value for reason in model.against})


def run_models_show(options: argparse.Namespace) -> int:
    """`osteogate models show`."""
    from models.package import ModelPackage
    from service.workflow import models
    from service.workflow.clock import utc_now
    from service.workflow.model import has_registry

    settings = Settings()
    package = ModelPackage.load(package_folder(options.model, settings))
    print(package.model_card())
    if not has_registry(settings):
        return 0
    with open_store(settings).transaction() as session:
        known = models.registry(session, utc_now()).models
    for model in known:
        if model.sha256 == package.sha256:
            print(f"{model.name}  {model.sha256}  {model.origin}  {_standing(model)}")
            for check in model.verdict.checks if model.verdict else ():
                print(f"  {'ok ' if check.passed else 'BAD'} {check.code.value}: {check.text}")
    return 0


def run_models_import(options: argparse.Namespace) -> int:
    """`osteogate models import`."""
    from service.workflow import models
    from service.workflow.packages import Library

    settings = Settings()
    with options.file.open("rb") as file:
        kept = Library.of(settings).receive(file)
    with open_store(settings).transaction() as session:
        model = models.enter_imported(session, kept, who_types())
    print(f"{model.id}  {model.name}  {model.sha256[:12]}  signature: {kept.provenance['signature']}")
    print("this site has to judge it before it can be promoted: osteogate models judge", file=sys.stderr)
    return 0


def run_models_export(options: argparse.Namespace) -> int:
    """`osteogate models export`: a file is written whole or not at all."""
    from service.workflow import models
    from service.workflow.packages import Library

    settings, draft = Settings(), options.out.with_name(f".{options.out.name}.draft")
    try:
        with draft.open("xb") as out, open_store(settings).transaction() as session:
            model = models.find(session, options.model)
            models.export(session, model, out, who_types(), library=Library.of(settings))
        draft.replace(options.out)
    finally:
        draft.unlink(missing_ok=True)
    print(options.out)
    return 0


def run_models_judge(options: argparse.Namespace) -> int:
    """`osteogate models judge`: 1 where the gate is shut."""
    import tempfile

    from models.evaluation import evaluate
    from models.package import ModelPackage
    from service.workflow import models
    from service.workflow.model import in_force_here
    from service.workflow.packages import Library

    settings = Settings()
    policy, library = site_policy(settings), Library.of(settings)
    folders = {"candidate": package_folder(options.model, settings), "champion": in_force_here(settings).folder}
    with tempfile.TemporaryDirectory() as folder:
        cohort = options.cohort or _locked_patients(options.run, settings, Path(folder) / "run")
        definitions = definitions_of(cohort, policy)
        reports = {name: Path(folder) / name / "report.json" for name in folders}
        for name, package in folders.items():
            loaded = ModelPackage.load(package)
            evaluate(loaded, cohort, Path(folder) / name, folds=options.folds, definitions=definitions)
        kept = library.keep(folders["candidate"], reports)
    with open_store(settings).transaction() as session:
        model = models.judged(session, kept, who_types(), policy=policy)
    for check in model.verdict.checks if model.verdict else ():
        print(f"{'ok ' if check.passed else 'BAD'} {check.code.value}: {check.text}")
    return 0 if model.verdict is not None and model.verdict.passed and not model.against else 1


def run_models_promote(options: argparse.Namespace) -> int:
    """`osteogate models promote`: every reason where the gate is shut."""
    from service.workflow import models
    from service.workflow.packages import Library

    settings = Settings()
    policy, library = site_policy(settings), Library.of(settings)
    try:
        with open_store(settings).transaction() as session:
            models.enrol_shipped(session, who_types().now)
            found = models.find(session, options.model)
            model = models.promote(
                session, found, options.reason, who_types(), library=library, policy=policy, person=options.person
            )
    except models.NotPromotable as shut:
        for reason in shut.reasons:
            print(f"{reason.code.value}: {reason.text}", file=sys.stderr)
        print("the gate is shut: nothing was changed", file=sys.stderr)
        return 1
    print(f"{model.name} is in force: each worker takes it with its next study")
    return 0


def run_models_rollback(options: argparse.Namespace) -> int:
    """`osteogate models rollback`."""
    from service.workflow import models

    with open_store(Settings()).transaction() as session:
        model = models.rollback(session, options.reason, who_types(), person=options.person)
    print(f"{model.name} is in force: each worker takes it with its next study")
    return 0
