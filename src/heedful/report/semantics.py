"""The catalogue of fused operations as Grimoire semantics: facts in Prolog, with plunit tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

SPELLS = {
    "build_extension": ("make", "build"),
    "run_tests": (".venv/bin/python", "-m", "pytest", "-q", "tests/ops"),
    "run_benchmarks": (".venv/bin/python", "-m", "pytest", "benchmarks/", "--benchmark-only"),
}

SEMANTICS = Template("""\
% Written by `heedful ops --semantics`.
:- encoding(utf8).
:- use_module(library(filesex)).
:- use_module(library(process)).

:- multifile entity/1, component/3, docstring/2, perceive/2, cast/2.
:- dynamic entity/1, component/3, docstring/2, perceive/2, cast/2.
:- discontiguous entity/1, component/3, docstring/2, perceive/2, cast/2.

% Outside of Grimoire nothing else says whose file this is.
:- if(\\+ current_predicate(self_entity/1)).
self_entity(Entity) :- ( entity(Entity) -> true ; assertz(entity(Entity)) ).
:- endif.
:- self_entity(heedful).

docstring(heedful, "Fused operations of heedful.ops, in C++ with gradients, for PyTorch on a CPU.").

$facts
% perceive(operations(Operations)): their entities.
perceive(operations(Operations)) :- findall(E, component(heedful, operation, E), Operations).

% perceive(operation_info(Operation), Info): its name, docstring and components, Name(Term) each.
perceive(operation_info(Operation), Info) :-
    component(heedful, operation, Operation),
    docstring(Operation, Docstring),
    findall(Fact, ( component(Operation, Name, Term), Fact =.. [Name, Term] ), Facts),
    Info = [name(Operation), docstring(Docstring)|Facts].

% cast(conjure(Spell), Result) runs the spell's command in the checkout, with its output on this process's own.
% Result is ok(exit(0)), or error(Why): exit(Status), killed(Signal), not_started(Error) or no_checkout.
cast(conjure(Spell), Result) :-
    component(heedful, spell(Spell), [Program|Arguments]),
    (   checkout(Root)
    ->  catch(run_command(Root, Program, Arguments, Status), Error, Status = not_started(Error)),
        ( Status == exit(0) -> Result = ok(Status) ; Result = error(Status) )
    ;   Result = error(no_checkout)
    ).

run_command(Root, Program, Arguments, Status) :-
    (   sub_atom(Program, _, _, _, /)
    ->  directory_file_path(Root, Program, Executable)
    ;   Executable = path(Program)
    ),
    process_create(Executable, Arguments, [cwd(Root), process(Process)]),
    process_wait(Process, Status).

% The checkout of heedful's repository: HEEDFUL_ROOT, or the nearest directory around this file that is one.
checkout(Root) :- getenv('HEEDFUL_ROOT', Root), !.
checkout(Root) :- loaded_from(Directory), around(Directory, Root), !.

around(Directory, Directory) :-
    directory_file_path(Directory, 'src/heedful/__init__.py', File),
    exists_file(File).
around(Directory, Root) :-
    file_directory_name(Directory, Parent),
    Parent \\== Directory,
    around(Parent, Root).

:- dynamic loaded_from/1.
:- prolog_load_context(directory, Directory), retractall(loaded_from(_)), assertz(loaded_from(Directory)).
""")

TESTS = Template("""\
% Written by `heedful ops --semantics`. Run by: swipl -g run_tests -t halt semantics.plt
:- encoding(utf8).
:- use_module(library(plunit)).
:- ensure_loaded(semantics).

expected([$names]).

with_spell(Command) :- assertz(component(heedful, spell(of_a_test), Command)).
without_spell :- retractall(component(heedful, spell(of_a_test), _)).

:- begin_tests(semantics).

test(itself) :- entity(heedful), docstring(heedful, Text), string(Text).
test(operations, Operations == Expected) :- expected(Expected), perceive(operations(Operations)).
test(entities, forall(( expected(Operations), member(Operation, Operations) ))) :- entity(Operation).
test(no_entity_twice) :- findall(E, entity(E), Entities), sort(Entities, Sorted), same_length(Entities, Sorted).
test(components, forall(( expected(Operations), member(Operation, Operations), member(Name, [
        formula, complexity, source, input, output, gradient, dtype, backend, operator, benchmark ]) ))) :-
    once(component(Operation, Name, _)).
test(gradients_are_inputs, forall(component(Operation, gradient, Name))) :-
    once(component(Operation, input, argument(Name, _, _))).
test(information, [nondet, forall(( expected(Operations), member(Operation, Operations) ))]) :-
    perceive(operation_info(Operation), Info),
    memberchk(name(Operation), Info),
    memberchk(docstring(Text), Info), string(Text), Text \\== "",
    memberchk(formula(Formula), Info), string(Formula).
test(information_of_nothing, fail) :- perceive(operation_info(no_such_operation), _).
test(spells, Spells == [$spells]) :- findall(Spell, component(heedful, spell(Spell), _), Spells).
test(unknown_spell, fail) :- cast(conjure(no_such_spell), _).

% The status that a command really ended with.
test(succeeds, [condition(checkout(_)), setup(with_spell([true])), cleanup(without_spell), Result == ok(exit(0))]) :-
    cast(conjure(of_a_test), Result).
test(fails, [condition(checkout(_)), setup(with_spell([sh, '-c', 'exit 3'])), cleanup(without_spell),
             Result == error(exit(3))]) :-
    cast(conjure(of_a_test), Result).
test(killed, [condition(checkout(_)), setup(with_spell([sh, '-c', 'kill -9 $$$$'])), cleanup(without_spell),
              Result == error(killed(9))]) :-
    cast(conjure(of_a_test), Result).
test(missing, [condition(checkout(_)), setup(with_spell([no_such_program])), cleanup(without_spell),
               Result = error(not_started(_))]) :-
    cast(conjure(of_a_test), Result).

:- end_tests(semantics).
""")


def write_semantics(data: dict[str, Any], directory: Path) -> list[Path]:
    """Writes semantics.pl and semantics.plt of `heedful.report.operations.as_data` there; returns their paths."""
    spells = [f"component(heedful, spell({spell}), {_list(command)})." for spell, command in SPELLS.items()]
    facts = [*spells, ""]
    for operation in data["operations"]:
        facts += [*_facts(operation, data["measured"]), ""]
    names = ", ".join(_atom(operation["name"]) for operation in data["operations"])
    texts = {
        "semantics.pl": SEMANTICS.substitute(facts="\n".join(facts)),
        "semantics.plt": TESTS.substitute(names=names, spells=", ".join(SPELLS)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def _facts(operation: dict[str, Any], measured: dict[str, Any] | None) -> Iterator[str]:
    entity = _atom(operation["name"])
    yield f"entity({entity})."
    yield f"component(heedful, operation, {entity})."
    yield f"docstring({entity}, {_string(operation['summary'])})."
    for name in ("formula", "complexity", "source"):
        yield f"component({entity}, {name}, {_string(operation[name])})."
    for name in ("input", "parameter", "output"):
        for argument in operation[f"{name}s"]:
            about = ", ".join([_atom(argument["name"]), _string(argument["shape"]), _string(argument["meaning"])])
            yield f"component({entity}, {name}, argument({about}))."
    if operation["module"]:
        yield f"component({entity}, module, {_atom(operation['module'])})."
    for name in ("gradient", "dtype", "backend", "operator"):
        for value in operation[f"{name}s"]:
            yield f"component({entity}, {name}, {_atom(value)})."
    for slower in operation["slower"]:
        about = f"{_string(slower['where'])}, {_string(slower['peer'])}, {_list(slower['left_by'])}"
        yield f"component({entity}, slower, slower({about}))."
    for case in operation["cases"]:
        yield f"component({entity}, benchmark, {_string(case)})."
    for row in measured["rows"] if measured else ():
        if row["operation"] == operation["name"]:
            ratios = ", ".join(f"{_atom(name)}-{peer['ratio']!r}" for name, peer in row["peers"].items())
            about = f"{_string(row['case'])}, {_atom(row['dtype'])}, {_string(row['pass'])}, {row['seconds']!r}"
            yield f"component({entity}, measured, measured({about}, [{ratios}]))."


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_atom, texts))}]"


def _atom(text: str) -> str:
    return f"'{_escaped(text, chr(39))}'"


def _string(text: str) -> str:
    return f'"{_escaped(text, chr(34))}"'


def _escaped(text: str, quote: str) -> str:
    return text.replace("\\", "\\\\").replace(quote, f"\\{quote}").replace("\n", "\\n")
