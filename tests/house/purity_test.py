"""The library computes and returns; it does not print, exit, or read its surroundings."""

import ast

from tests.house import tree

FORBIDDEN_CALLS = {"print", "exit", "quit", "breakpoint", "input", "sys.exit", "os._exit"}
FORBIDDEN_NAMES = {"os.environ", "os.getenv", "os.putenv", "sys.argv"}
FORBIDDEN_IMPORTS = {"absl.flags", "absl.app", "argparse"}
SHARDING_NAMES = {"PartitionSpec", "shard_map"}
SHARDING_HOME = f"{tree.LIBRARY}/parallel/"


def test_the_library_neither_prints_nor_exits():
    for path in tree.python_files(tree.LIBRARY, tree.KERNELS):
        for node in ast.walk(tree.syntax(path)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in FORBIDDEN_CALLS, f"{tree.relative(path)}:{node.lineno} {name}()"


def test_the_library_reads_no_environment_and_no_flags():
    for path in tree.python_files(tree.LIBRARY, tree.KERNELS):
        assert not tree.imported_modules(path) & FORBIDDEN_IMPORTS, tree.relative(path)
        for line, name in tree.mentioned_names(path):
            assert name not in FORBIDDEN_NAMES, f"{tree.relative(path)}:{line} {name}"


def test_shardings_are_named_in_the_parallel_package_only():
    for path in tree.python_files(tree.LIBRARY, tree.EXPERIMENTS):
        if tree.relative(path).startswith(SHARDING_HOME):
            continue
        for line, name in tree.mentioned_names(path):
            found = SHARDING_NAMES & set(name.split("."))
            assert not found, f"{tree.relative(path)}:{line} names {found}; use llama4_jax.parallel"


def test_flax_is_used_as_plain_pytrees():
    """`nnx.jit` and its kin hide state; plain jax transforms over immutable pytrees do not."""
    hidden = {f"nnx.{name}" for name in ("jit", "grad", "value_and_grad", "scan", "vmap", "remat")}
    for path in tree.python_files(tree.LIBRARY, tree.EXPERIMENTS):
        for line, name in tree.mentioned_names(path):
            assert name not in hidden, f"{tree.relative(path)}:{line} {name}; use the jax transform"
