"""One adapter per tool: write(n, root) makes its pipeline file from the DAG; run/plan are argv lists.

`bin` is the folder of that tool's virtual environment (or "" for one on PATH).
To add ours: a class with write() that turns dag.nodes(n) into a pipeline file, and the argv of run and plan.
"""
import json, os, sys
import dag


def cmd(k, o, d):
    return f"sh node.sh {k} {o} {' '.join(d)}"


class Tool:
    name, jobs, plan, status, caches = "", 2, None, None, True
    env = {}

    def __init__(self, bin=""):
        self.b = bin + "/" if bin else ""

    def write(self, n, root): ...

    def sink(self, n, root):
        return f"{root}/{dag.nodes(n)[-1][1]}"


class Make(Tool):
    name = "make"

    def write(self, n, root):
        ns = dag.nodes(n)
        with open(f"{root}/Makefile", "w") as f:
            f.write(f"all: {ns[-1][1]}\n")
            for k, o, d in ns:
                f.write(f"{o}: {' '.join(d)}\n\t@{cmd(k, o, d)}\n")
        self.run, self.plan = ["make", "-j2", "-s"], ["make", "-n"]


class Ninja(Tool):
    name = "ninja"

    def write(self, n, root):
        ns = dag.nodes(n)
        with open(f"{root}/build.ninja", "w") as f:
            f.write("rule n\n  command = sh node.sh $id $out $in\n")
            for k, o, d in ns:
                f.write(f"build {o}: n {' '.join(d)}\n  id = {k}\n")
            f.write(f"default {ns[-1][1]}\n")
        self.run, self.plan = ["ninja", "-j2", "--quiet"], ["ninja", "-n", "-d", "explain"]


class Floor(Tool):
    """No tool: the least that one does which keeps logs, hashes, manifests and a journal (floor.rs)."""
    name, caches = "floor", False

    def write(self, n, root):
        self.run = [self.b + "floor", "."]

    def sink(self, n, root):
        return f"{root}/store/{n - 1:064}/v"


class Snakemake(Tool):
    """One wildcard rule with an input function: the idiomatic form."""
    name = "snakemake"
    env = {"XDG_CACHE_HOME": ".cache"}

    def write(self, n, root):
        ns = dag.nodes(n)
        with open(f"{root}/Snakefile", "w") as f:
            f.write(f'''import json
NEEDS = {{str(x["id"]): x["deps"] for x in json.load(open("dag.json"))}}
rule all:
    input: "{ns[-1][1]}"
rule node:
    input: lambda w: NEEDS[w.k]
    output: "out/n{{k}}.txt"
    wildcard_constraints: k=r"\\d+"
    shell: "sh node.sh {{wildcards.k}} {{output}} {{input}}"
''')
        s = self.b + "snakemake"
        self.run = [s, "--cores", "2", "--quiet", "all", "--scheduler", "greedy"]
        self.plan = [s, "-n", "--quiet", "all", "--cores", "2"]


class Dvc(Tool):
    """One stage per node in dvc.yaml, no SCM. DVC runs stages one at a time."""
    name, jobs = "dvc", 1
    env = {"DVC_NO_ANALYTICS": "1"}

    def write(self, n, root):
        import subprocess
        with open(f"{root}/dvc.yaml", "w") as f:
            f.write("stages:\n")
            for k, o, d in dag.nodes(n):
                f.write(f"  n{k}:\n    cmd: {cmd(k, o, d)}\n    deps:\n")
                f.writelines(f"    - {x}\n" for x in d)
                f.write(f"    outs:\n    - {o}\n")
        if not os.path.isdir(f"{root}/.dvc"):
            subprocess.run([self.b + "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
            subprocess.run([self.b + "dvc", "config", "core.analytics", "false"], cwd=root, check=True)
            subprocess.run([self.b + "dvc", "config", "core.check_update", "false"], cwd=root, check=True)
        self.run, self.plan = [self.b + "dvc", "repro", "-q"], [self.b + "dvc", "repro", "--dry", "-q"]


class Luigi(Tool):
    """Existence-based: a changed input is not noticed (no content or time check)."""
    name = "luigi"

    def write(self, n, root):
        with open(f"{root}/pipe.py", "w") as f:
            f.write('''import json, subprocess, luigi
DAG = {x["id"]: x for x in json.load(open("dag.json"))}
BY_OUT = {x["out"]: i for i, x in DAG.items()}
class Node(luigi.Task):
    k = luigi.IntParameter()
    def requires(self):
        return [Node(k=BY_OUT[d]) for d in DAG[self.k]["deps"] if d in BY_OUT]
    def output(self):
        return luigi.LocalTarget(DAG[self.k]["out"])
    def run(self):
        x = DAG[self.k]
        subprocess.run(["sh", "node.sh", str(self.k), x["out"], *x["deps"]], check=True)
class All(luigi.WrapperTask):
    def requires(self):
        return Node(k=max(DAG))
''')
        self.run = [self.b + "python", "-m", "luigi", "--module", "pipe", "All", "--local-scheduler", "--workers", "2", "--log-level", "ERROR"]
        self.env = {"PYTHONPATH": "."}


class Doit(Tool):
    name = "doit"

    def write(self, n, root):
        with open(f"{root}/dodo.py", "w") as f:
            f.write('''import json
DOIT_CONFIG = {"verbosity": 0, "reporter": "zero"}
def task_node():
    for x in json.load(open("dag.json")):
        yield {"name": str(x["id"]), "file_dep": x["deps"], "targets": [x["out"]],
               "actions": ["sh node.sh %d %s %s" % (x["id"], x["out"], " ".join(x["deps"]))]}
''')
        self.run = [self.b + "doit", "-n", "2"]
        self.plan = [self.b + "doit", "list", "--all", "--status"]


class Redun(Tool):
    """Call-graph caching in SQLite; each node is a task returning a File."""
    name = "redun"

    def write(self, n, root):
        with open(f"{root}/wf.py", "w") as f:
            f.write('''import json, subprocess
from redun import task, File
redun_namespace = "bench"
@task()
def node(k, out, deps):
    subprocess.run(["sh", "node.sh", str(k), out, *[d.path for d in deps]], check=True)
    return File(out)
@task(cache=False)
def main():
    v = {}
    for x in json.load(open("dag.json")):
        v[x["out"]] = node(x["id"], x["out"], [v[d] if d in v else File(d) for d in x["deps"]])
    return v[x["out"]]
''')
        self.run = [self.b + "redun", "run", "wf.py", "main"]
        self.jobs = "threads"


class HyperQueue(Tool):
    """HyperQueue's in-process cluster from its PyPI wheel (no cache: executor overhead only)."""
    name, caches = "hyperqueue", False

    def write(self, n, root):
        with open(f"{root}/hq.py", "w") as f:
            f.write('''import json, os
from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig
with LocalCluster() as c:
    c.start_worker(WorkerConfig(cores=2))
    cl, job, t = c.client(), Job(), {}
    for x in json.load(open("dag.json")):
        t[x["out"]] = job.program(["sh", "node.sh", str(x["id"]), x["out"], *x["deps"]], cwd=os.getcwd(),
                                  stdout=None, stderr=None, deps=[t[d] for d in x["deps"] if d in t])
    cl.wait_for_jobs([cl.submit(job)])
''')
        self.run = [self.b + "python", "hq.py"]


class Deepgen(Tool):
    """One `command` node per node; results in artifacts/, hashed; the sink is read through the run's links."""
    name = "deepgen"

    def write(self, n, root):
        ns = dag.nodes(n)
        made = {o: k for k, o, _ in ns}
        os.makedirs(f"{root}/stages", exist_ok=True)
        with open(f"{root}/stages/command.toml", "w") as f:
            f.write('kind = "command"\n')
        with open(f"{root}/bench.toml", "w") as f:
            f.write('[pipeline]\nname = "bench"\n[executor.local]\nslots = { cpu = 2 }\n')
            for k, o, d in ns:
                ins = [f"i{made[x]} = \"n{made[x]}\"" for x in d if x in made]
                files = [f'"{x}"' for x in d if x not in made]
                args = [f"{{input.i{made[x]}}}/v" if x in made else f"{{root}}/{x}" for x in d]
                argv = ["sh", "{root}/node.sh", str(k), "{out}/v", *args]
                f.write(f"[node.n{k}]\nstage = \"command\"\ninputs = {{ {', '.join(ins)} }}\n")
                f.write(f"set.argv = [{', '.join(json.dumps(x) for x in argv)}]\n")
                if files:
                    f.write(f"set.files = [{', '.join(files)}]\n")
        s = self.b + "deepgen"
        self.last = ns[-1][0]
        self.run, self.plan = [s, "run", "bench.toml", "--quiet"], [s, "plan", "bench.toml"]
        self.status = [s, "status"]

    def sink(self, n, root):
        runs = sorted(os.listdir(f"{root}/artifacts/runs"))
        return f"{root}/artifacts/runs/{runs[-1]}/nodes/n{self.last}/v"


ALL = {t.name: t for t in (Deepgen, Floor, Make, Ninja, Snakemake, Dvc, Luigi, Doit, Redun, HyperQueue)}
