"""A small interpreter of the ``__init__`` methods of torch modules: it builds the tree of their parameters' shapes.

It knows the statements and expressions with which transformers builds its models, numbers, texts, lists, the layers of
``torch.nn`` that have parameters, and the values of a configuration. What it does not know is ``UNKNOWN``; where that
decides which modules there are, it raises ``CannotTell``. It never runs anything of the file that it reads.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

from dsconv.checkpoint.formats.huggingface.modules import (
    FILLED,
    LAYERS,
    MAX_STEPS,
    UNKNOWN,
    CannotTell,
    Configuration,
    Module,
    Tensor,
    Unknown,
    bounded_range,
    repeated,
)

BASES = {"nn.Module", "PreTrainedModel", "GenerationMixin", "GradientCheckpointingLayer", "PreTrainedConfig", "ABC"}
# Functions whose result is no module, though it is not computed here.
HARMLESS = {"getattr", "hasattr", "isinstance", "get_activation", "len", "int", "float", "bool", "str", "list", "set",
            "max", "min", "sum", "any", "all", "range", "round", "abs", "partial", "tuple", "sorted"}  # fmt: skip
BUILTINS: dict[str, Callable[..., Any]] = {
    "range": bounded_range, "len": len, "int": int, "float": float, "bool": bool, "str": str, "max": max, "min": min,
    "abs": abs, "sum": sum, "list": list, "tuple": tuple, "dict": dict, "enumerate": enumerate, "zip": zip,
    "round": round, "set": set, "sorted": sorted, "any": any, "all": all,
}  # fmt: skip
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


class _Returned(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class Interpreter:
    """Runs ``__init__`` methods of the classes of one file."""

    def __init__(self, classes: Mapping[str, ast.ClassDef]) -> None:
        self.classes = classes
        self.steps = 0

    def instantiate(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Module:
        """Return the module that a class makes. Raises CannotTell."""
        node = self.classes[name]
        module = Module(node=node)
        self._initialise(node, module, args, kwargs)
        return module

    def call_if_defined(self, node: ast.ClassDef, name: str, owner: Any) -> None:
        """Run a method of a class on ``owner``, if the class has it."""
        function = self._function(node, name)
        if function is not None:
            self._run_function(function, node, owner, [], {})

    def _function(self, node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
        return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name), None)

    def _initialise(self, node: ast.ClassDef, module: Module, args: list[Any], kwargs: dict[str, Any]) -> None:
        function = self._function(node, "__init__")
        if function is None:
            self._initialise_base(node, module, args, kwargs)
        else:
            self._run_function(function, node, module, args, kwargs)

    def _initialise_base(self, node: ast.ClassDef, module: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        for base in node.bases:
            name = ast.unparse(base)
            if name in self.classes:
                return self._initialise(self.classes[name], module, args, kwargs)
            if name in LAYERS:
                made = LAYERS[name](*args, **kwargs)
                module.tensors |= made.tensors
                module.children |= made.children
                return None
            if name not in BASES:
                raise CannotTell
        if isinstance(module, Module) and args and isinstance(args[0], Configuration):
            module.attributes["config"] = args[0]
        return None

    def _run_function(
        self, function: ast.FunctionDef, node: ast.ClassDef, owner: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        given = function.args
        if given.vararg or given.posonlyargs:
            raise CannotTell
        names = [argument.arg for argument in given.args]
        scope: dict[str, Any] = {names[0]: owner, "__class__": node, "__self__": owner}
        for name, default in zip(reversed(names), reversed(given.defaults), strict=False):
            scope[name] = self._value(default, {})
        for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            scope[argument.arg] = self._value(value, {}) if value is not None else UNKNOWN
        scope |= dict(zip(names[1:], args, strict=False))
        known = {*names, *(argument.arg for argument in given.kwonlyargs)}
        scope |= {key: value for key, value in kwargs.items() if key in known}
        if given.kwarg:
            scope[given.kwarg.arg] = UNKNOWN
        if missing := [name for name in names if name not in scope]:
            scope |= dict.fromkeys(missing, UNKNOWN)
        try:
            self._run(function.body, scope)
        except _Returned as returned:
            return returned.value
        return None

    def _run(self, body: list[ast.stmt], scope: dict[str, Any]) -> None:
        for statement in body:
            self._step()
            self._statement(statement, scope)

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise CannotTell

    def _statement(self, statement: ast.stmt, scope: dict[str, Any]) -> None:
        if isinstance(statement, ast.Assign):
            value = self._value(statement.value, scope)
            for target in statement.targets:
                self._assign(target, value, statement.value, scope)
        elif isinstance(statement, ast.AnnAssign):
            if statement.value is not None:
                self._assign(statement.target, self._value(statement.value, scope), statement.value, scope)
        elif isinstance(statement, ast.AugAssign):
            value = self._binary(
                statement.op, self._value(_as_load(statement.target), scope), self._value(statement.value, scope)
            )
            self._assign(statement.target, value, statement.value, scope)
        elif isinstance(statement, ast.Expr):
            self._value(statement.value, scope)
        elif isinstance(statement, ast.If):
            self._branch(statement, scope)
        elif isinstance(statement, ast.For):
            items = self._value(statement.iter, scope)
            if isinstance(items, Unknown):
                raise CannotTell
            for item in items:
                self._assign(statement.target, item, statement.iter, scope)
                self._run(statement.body, scope)
        elif isinstance(statement, ast.With):
            self._run(statement.body, scope)
        elif isinstance(statement, ast.Return):
            raise _Returned(self._value(statement.value, scope) if statement.value is not None else None)
        elif isinstance(statement, (ast.Pass, ast.Assert, ast.Import, ast.ImportFrom)):
            pass
        else:  # raise, while, try, del, functions
            raise CannotTell

    def _branch(self, statement: ast.If, scope: dict[str, Any]) -> None:
        test = self._value(statement.test, scope)
        if not isinstance(test, Unknown):
            self._run(statement.body if test else statement.orelse, scope)
            return
        # Both ways have to give the same parameters; what else they set is not known then.
        outcomes = []
        for body in (statement.body, statement.orelse):
            trial = copy.deepcopy({key: value for key, value in scope.items() if key != "__class__"})
            trial["__class__"] = scope["__class__"]
            if not any(isinstance(one, ast.Raise) for one in body):
                self._run(body, trial)
                outcomes.append(trial)
        owners = [outcome["__self__"] for outcome in outcomes]
        trees = {repr(sorted(owner.flat())) for owner in owners if isinstance(owner, Module)}
        if not owners or len(trees) > 1:
            raise CannotTell
        owner, first = scope["__self__"], outcomes[0]
        changed = first["__self__"]
        for key, value in first.items():
            if len(outcomes) > 1 and not isinstance(value, (Module, Configuration)) and key != "__class__":
                first[key] = value if repr(value) == repr(outcomes[1].get(key)) else UNKNOWN
        scope.update({key: value for key, value in first.items() if value is not changed})
        vars(owner).update(vars(changed))

    def _assign(self, target: ast.expr, value: Any, source: ast.expr, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = value if isinstance(value, (list, tuple)) else [UNKNOWN] * len(target.elts)
            if len(values) != len(target.elts):
                raise CannotTell
            for one, item in zip(target.elts, values, strict=True):
                self._assign(one, item, ast.Constant(None), scope)  # modules do not come in pairs
        elif isinstance(target, ast.Attribute):
            owner = self._value(target.value, scope)
            if isinstance(owner, Module):
                if isinstance(value, Unknown) and _makes_a_module(source):
                    raise CannotTell
                owner.set(target.attr, value)
            elif isinstance(owner, Configuration):
                owner.values[owner.names.get(target.attr, target.attr)] = value
        elif isinstance(target, ast.Subscript):
            owner = self._value(target.value, scope)
            if isinstance(owner, (Module, list)):
                raise CannotTell

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        self._step()
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        return method(node, scope) if method is not None else UNKNOWN

    def _constant(self, node: ast.Constant, scope: dict[str, Any]) -> Any:
        return node.value

    def _name(self, node: ast.Name, scope: dict[str, Any]) -> Any:
        return scope.get(node.id, self.classes.get(node.id, UNKNOWN))

    def _attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        owner = self._value(node.value, scope)
        return owner.get(node.attr) if isinstance(owner, (Module, Configuration)) else UNKNOWN

    def _list(self, node: ast.List, scope: dict[str, Any]) -> Any:
        return [self._value(one, scope) for one in node.elts]

    def _tuple(self, node: ast.Tuple, scope: dict[str, Any]) -> Any:
        return tuple(self._value(one, scope) for one in node.elts)

    def _dict(self, node: ast.Dict, scope: dict[str, Any]) -> Any:
        if any(key is None for key in node.keys):
            return UNKNOWN
        return {self._value(k, scope): self._value(v, scope) for k, v in zip(node.keys, node.values, strict=True) if k}

    def _joinedstr(self, node: ast.JoinedStr, scope: dict[str, Any]) -> Any:
        parts = [self._value(one.value if isinstance(one, ast.FormattedValue) else one, scope) for one in node.values]
        return UNKNOWN if any(isinstance(part, Unknown) for part in parts) else "".join(map(str, parts))

    def _subscript(self, node: ast.Subscript, scope: dict[str, Any]) -> Any:
        owner, key = self._value(node.value, scope), self._value(node.slice, scope)
        if isinstance(owner, (list, tuple, dict, str)) and not isinstance(key, Unknown):
            try:
                return owner[key]
            except (KeyError, IndexError, TypeError):
                return UNKNOWN
        return UNKNOWN

    def _ifexp(self, node: ast.IfExp, scope: dict[str, Any]) -> Any:
        test = self._value(node.test, scope)
        if isinstance(test, Unknown):
            return UNKNOWN
        return self._value(node.body if test else node.orelse, scope)

    def _boolop(self, node: ast.BoolOp, scope: dict[str, Any]) -> Any:
        wants = isinstance(node.op, ast.Or)
        value: Any = UNKNOWN
        doubt = False
        for one in node.values:
            value = self._value(one, scope)
            if isinstance(value, Unknown):
                doubt = True
            elif bool(value) == wants:
                return UNKNOWN if doubt and wants and not isinstance(value, bool) else value
        return UNKNOWN if doubt else value

    def _unaryop(self, node: ast.UnaryOp, scope: dict[str, Any]) -> Any:
        value = self._value(node.operand, scope)
        if isinstance(value, Unknown):
            return UNKNOWN
        return not value if isinstance(node.op, ast.Not) else -value if isinstance(node.op, ast.USub) else UNKNOWN

    def _binop(self, node: ast.BinOp, scope: dict[str, Any]) -> Any:
        return self._binary(node.op, self._value(node.left, scope), self._value(node.right, scope))

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        plain = all(isinstance(one, (int, float, str, list, tuple)) for one in (left, right))
        if not plain or type(op) not in BINARY or (isinstance(op, ast.Pow) and abs(right) > 64):
            return UNKNOWN
        if isinstance(op, ast.Mult) and not all(isinstance(one, (int, float)) for one in (left, right)):
            return repeated(left, right)
        return BINARY[type(op)](left, right)

    def _compare(self, node: ast.Compare, scope: dict[str, Any]) -> Any:
        left = self._value(node.left, scope)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self._value(right_node, scope)
            if isinstance(left, Unknown) or isinstance(right, Unknown):
                return UNKNOWN
            if not COMPARED[type(op)](left, right):
                return False
            left = right
        return True

    def _listcomp(self, node: ast.ListComp, scope: dict[str, Any]) -> Any:
        generator = node.generators[0]
        items = self._value(generator.iter, scope)
        if len(node.generators) > 1 or isinstance(items, Unknown):
            return UNKNOWN
        found = []
        inner = dict(scope)
        for item in items:
            self._assign(generator.target, item, generator.iter, inner)
            tests = [self._value(test, inner) for test in generator.ifs]
            if any(isinstance(test, Unknown) for test in tests):
                return UNKNOWN
            if all(tests):
                found.append(self._value(node.elt, inner))
        return found

    _generatorexp = _listcomp

    def _call_arguments(self, node: ast.Call, scope: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        for one in node.args:
            if isinstance(one, ast.Starred):
                value = self._value(one.value, scope)
                if not isinstance(value, (list, tuple)):
                    raise CannotTell
                args += value
            else:
                args.append(self._value(one, scope))
        return args, {one.arg: self._value(one.value, scope) for one in node.keywords if one.arg}

    def _call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        name = ast.unparse(node.func)
        if name == "super().__init__":
            args, kwargs = self._call_arguments(node, scope)
            self._initialise_base(scope["__class__"], scope["__self__"], args, kwargs)
            return None
        if name.startswith("super().") or name in ("hasattr", "isinstance"):
            return UNKNOWN
        if name == "getattr":
            return self._getattr(node, scope)
        if name == "setattr" or name.endswith(".__init__"):
            raise CannotTell
        args, kwargs = self._call_arguments(node, scope)
        if name in ("nn.Parameter", "torch.nn.Parameter"):
            return args[0] if args and isinstance(args[0], Tensor) else Tensor(None)
        if name == "nn.Buffer":
            return Tensor(_shape_of(args), kept=_kept(kwargs))
        if name in FILLED:
            return Tensor(_filled(args))
        if name.removeprefix("torch.") in LAYERS:
            return LAYERS[name.removeprefix("torch.")](*args, **kwargs)
        if name in self.classes:
            return self.instantiate(name, args, kwargs)
        if name in BUILTINS:
            return UNKNOWN if any(isinstance(one, Unknown) for one in args) else BUILTINS[name](*args)
        if name in ("copy.deepcopy", "deepcopy", "copy.copy"):
            return copy.deepcopy(args[0]) if args else UNKNOWN
        if isinstance(node.func, ast.Attribute):
            return self._method(node.func, args, kwargs, scope)
        called = self._value(node.func, scope)
        if isinstance(called, ast.ClassDef):
            return self.instantiate(called.name, args, kwargs)
        return UNKNOWN

    def _method(self, function: ast.Attribute, args: list[Any], kwargs: dict[str, Any], scope: dict[str, Any]) -> Any:
        owner, name = self._value(function.value, scope), function.attr
        if isinstance(owner, list) and name in ("append", "extend") and len(args) == 1:
            if name == "extend" and not isinstance(args[0], (list, tuple)):
                raise CannotTell
            getattr(owner, name)(args[0])
            return None
        if isinstance(owner, str) and name in ("split", "lower", "upper", "startswith", "endswith"):
            return getattr(owner, name)(*args)
        if isinstance(owner, Module):
            if name in ("register_buffer", "register_parameter") and args and isinstance(args[0], str):
                value = args[1] if len(args) > 1 else kwargs.get("tensor", UNKNOWN)
                if value is not None:
                    owner.set(args[0], Tensor(_shape_of([value]), kept=_kept(kwargs, args[2:])))
                return None
            if name == "append" and len(args) == 1 and isinstance(args[0], Module):
                owner.children[str(len(owner.children))] = args[0]
                return None
            if name in ("add_module", "register_module") and len(args) == 2 and isinstance(args[0], str):
                owner.set(args[0], args[1])
                return None
            found = self._function(owner.node, name) if owner.node is not None else None
            if found is not None and not found.decorator_list:
                return self._run_function(found, owner.node or scope["__class__"], owner, args, kwargs)
        return UNKNOWN

    def _getattr(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        args = [self._value(one, scope) for one in node.args]
        if len(args) < 2 or not isinstance(args[1], str):
            return UNKNOWN
        if isinstance(args[0], Configuration):
            name = args[0].names.get(args[1], args[1])
            if name in args[0].values:
                return args[0].get(name)
            return args[2] if len(args) > 2 else UNKNOWN
        return UNKNOWN


def _shape_of(args: list[Any]) -> tuple[int, ...] | None:
    return args[0].shape if args and isinstance(args[0], Tensor) else None


def _kept(kwargs: dict[str, Any], args: list[Any] | None = None) -> bool:
    persistent = kwargs.get("persistent", args[0] if args else True)
    if isinstance(persistent, Unknown):
        raise CannotTell
    return bool(persistent)


def _filled(args: list[Any]) -> tuple[int, ...] | None:
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    return tuple(sizes) if all(type(size) is int for size in sizes) else None


def _as_load(target: ast.expr) -> ast.expr:
    found = copy.copy(target)
    if isinstance(found, (ast.Name, ast.Attribute, ast.Subscript)):
        found.ctx = ast.Load()
    return found


def _makes_a_module(source: ast.expr) -> bool:
    """Return whether an expression that was not computed may be a module: a call that does not give a number."""
    if isinstance(source, ast.IfExp):
        return _makes_a_module(source.body) or _makes_a_module(source.orelse)
    if isinstance(source, ast.BoolOp):
        return any(_makes_a_module(one) for one in source.values)
    if isinstance(source, (ast.Name, ast.ListComp, ast.GeneratorExp)):
        return True
    if not isinstance(source, ast.Call):
        return False
    if isinstance(source.func, ast.Attribute):
        owner = ast.unparse(source.func.value)
        return owner == "self" or source.func.attr[:1].isupper() or "from_" in source.func.attr
    return not isinstance(source.func, ast.Name) or source.func.id not in HARMLESS
