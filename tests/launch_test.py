"""The launchers, in real shells; gcloud and the like are stand-ins."""

import contextlib
import fnmatch
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from tests.process import wait_for

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
ODD = "--config.data.source=folder:/my data/it's \"$(HOME) ${NAME} \\ &"
POD = ("--name=pod", "--zone=us-east5-b")
TRAIN = ("--config=configs/digits.py:smoke", "--workdir=gs://bucket/run", ODD)
JOBSET = (
  *("run", "--name=b2", "--image=host/drift_jax:tpu"),
  *("--accelerator=v6e", "--topology=8x16", *TRAIN),
)
# What the scripts use beside the tool that launches.
TOOLS = """
  awk bash cat date dirname git grep hostname id mkdir pkill setsid sleep tail
  tr
"""


def call(script, *arguments, **kwargs):
  return subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    **kwargs,
  )


def dry_run(script, *arguments, **kwargs):
  """The commands that a dry run prints, which are a shell's."""
  command, *flags = arguments
  done = call(script, command, "--dry-run", *flags, **kwargs)
  assert done.returncode == 0, done.stderr
  subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
  return [
    words
    for line in done.stdout.splitlines()
    if (words := shlex.split(line, comments=True))
  ]


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
  """The only folder on PATH: nothing real is launched, dry or not."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for tool in TOOLS.split():
    path = shutil.which(tool)
    assert path is not None, tool
    (folder / tool).symlink_to(path)
  monkeypatch.setenv("PATH", str(folder))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.delenv("SLURM_JOB_ID", raising=False)
  return folder


@pytest.fixture
def stand_in(tmp_path, programs):
  """Puts programs on PATH that write down their arguments; returns a reader.

  Program NAME waits for SECONDS_NAME and exits with CODE_NAME.
  """
  record = tmp_path / "record"
  record.touch()

  def install(*names):
    for name in names:
      path = programs / name
      path.unlink(missing_ok=True)
      path.write_text(f"""#!/usr/bin/env bash
        {{ printf '%s\\0' {name} "$@"; printf '\\n'; }} >>{record}
        case "$*" in *--filename=-) cat >{tmp_path}/stdin ;; esac
        sleep "${{SECONDS_{name}:-0}}"
        exit "${{CODE_{name}:-0}}"
      """)
      path.chmod(0o755)

    def read():
      lines = record.read_text().split("\0\n")[:-1]
      return [line.split("\0") for line in lines]

    return read

  return install


def remote(words):
  """The words of the command line that a worker's shell gets."""
  (line,) = [w.partition("=")[2] for w in words if w.startswith("--command=")]
  subprocess.run(["bash", "-n"], input=line, text=True, check=True)
  return shlex.split(line)


# Style.


def test_shellcheck():
  files = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
  checker = pathlib.Path(sys.executable).parent / "shellcheck"
  done = subprocess.run(
    [checker, *files], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


# The same commands, dry or not.


@pytest.mark.parametrize(
  ("script", "tool", "arguments"),
  [
    ("tpu_pod.sh", "gcloud", ("create", *POD, "--type=v6e-128", "--spot")),
    ("tpu_pod.sh", "gcloud", ("setup", *POD, "--project=mine")),
    ("tpu_pod.sh", "gcloud", ("setup", *POD, "--repository=https://a/b c")),
    ("tpu_pod.sh", "gcloud", ("run", *POD, *TRAIN)),
    ("tpu_pod.sh", "gcloud", ("exec", *POD, "--", "ls", "it's a")),
    ("tpu_pod.sh", "gcloud", ("logs", *POD, "--worker=3")),
    ("tpu_pod.sh", "gcloud", ("teardown", *POD, "--queued")),
    ("gke.sh", "kubectl", ("logs", "--name=b2", "--worker=3")),
    ("gke.sh", "kubectl", ("stop", "--name=b2", "--context=other")),
    ("docker.sh", "docker", ("build", "--accelerator=tpu", "--push")),
    ("docker.sh", "docker", ("run", "--gpus", *TRAIN)),
    ("slurm.sbatch", "sbatch", ("--nodes=4", "--time=1-0", *TRAIN)),
  ],
)
def test_runs_what_a_dry_run_prints(stand_in, script, tool, arguments):
  promised = dry_run(script, *arguments)
  assert promised[0][0] in (tool, "git")
  read = stand_in(tool, "git")
  done = call(script, *arguments)
  assert done.returncode == 0, done.stderr
  ran = [words for words in read() if words[3:4] != ["status"]]
  assert ran == [words for words in promised if words[0] != "srun"]


def test_gke_creates_the_manifest_of_its_dry_run(stand_in, tmp_path):
  printed = call("gke.sh", *JOBSET, "--dry-run").stdout
  command, _, rest = printed.partition(" <<'END'\n")
  read = stand_in("kubectl")
  done = call("gke.sh", *JOBSET)
  assert done.returncode == 0, done.stderr
  assert read() == [shlex.split(command)]
  assert (tmp_path / "stdin").read_text() + "END\n" == rest


def test_a_tool_fails(stand_in, monkeypatch):
  """The next command is not run, and the failure is told."""
  read = stand_in("gcloud", "docker")
  monkeypatch.setenv("CODE_gcloud", "7")
  assert call("tpu_pod.sh", "setup", *POD).returncode == 7
  assert [words[4] for words in read()] == ["scp"]
  monkeypatch.setenv("CODE_docker", "8")
  assert call("docker.sh", "build", "--push").returncode == 8
  assert [words[1] for words in read()[1:]] == ["build"]


def test_a_tool_that_is_missing():
  assert call("gke.sh", *JOBSET, "--dry-run").returncode == 0
  done = call("gke.sh", *JOBSET)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("Error: kubectl is not on PATH: install it")
  assert done.stderr.count("\n") == 1


# Bad input.


@pytest.mark.parametrize(
  ("line", "parts"),
  [
    ("tpu_pod.sh", "command '': valid options are create setup run"),
    ("tpu_pod.sh stop --zone=us-east5-b", "--name is missing; see"),
    ("tpu_pod.sh stop --name=Pod --zone=a", "--name='Pod': want lower-case"),
    ("tpu_pod.sh create POD --type=v6e-127", "sizes of v6e are 1 4 8 16"),
    ("tpu_pod.sh create POD --type=v5p-12", "of v5p are multiples of 8"),
    ("tpu_pod.sh create POD --spot=1", "--spot=1: --spot takes no value"),
    ("tpu_pod.sh create POD --type", "--type has no value: write --type=VALUE"),
    ("tpu_pod.sh stop POD --config.seed=1", "'--config.seed=1': only run"),
    ("tpu_pod.sh setup POD --ref=main", "--ref='main' needs --repository=URL"),
    ("tpu_pod.sh run POD CONFIG --workdir=runs/a", "'runs/a': valid options"),
    ("tpu_pod.sh run POD CONFIG --workdir=gs://BUCKET/a", "are lower case"),
    ("tpu_pod.sh exec POD --config.seed=1", "exec wants -- COMMAND"),
    ("tpu_pod.sh exec POD", "exec wants -- COMMAND"),
    ("tpu_pod.sh run POD CONFIG --config.seed", "write --config.seed=VALUE"),
    ("tpu_pod.sh run RUN --config=configs/digit.py", "configs/ablations.py c"),
    ("tpu_pod.sh run RUN --config=digit:smoke", "configs/ablations.py c"),
    ("gke.sh JOBSET --accelerator=v9", "options are v4 v5e v5p v6e tpu7x"),
    ("gke.sh JOBSET --topology=4x16", "'4x16': valid options are 1x1 2x2 2x4"),
    ("gke.sh V5P --topology=4x4x6", "want one of 2x2x1 2x2x2 2x2x4 2x4x4, or"),
    ("gke.sh JOBSET --image=a;b", "--image='a;b': want an image"),
    ("gke.sh JOBSET --claim=NAME", "--claim='NAME': want a Kubernetes name: l"),
    ("gke.sh JOBSET --workdir=runs/a", "absolute path on a volume"),
    ("docker.sh build --accelerator=rocm", "options are cpu cuda12 cuda13 tpu"),
    ("docker.sh run CONFIG --workdir=a --data=no/such", "no such folder"),
    ("docker.sh run CONFIG --workdir=~me/a", "--workdir='~me/a': give the who"),
    ("slurm.sbatch CONFIG --workdir=a --nodes=0", "--nodes='0': want a number"),
    ("daemon.sh restart", "'restart': valid options are start status logs"),
    ("daemon.sh start", "start has no command; see"),
    ("restart.sh", "no command; see"),
  ],
)
def test_bad_input(stand_in, line, parts):
  read = stand_in("gcloud", "kubectl", "docker", "sbatch")
  names = {"POD": POD, "CONFIG": TRAIN[:1], "JOBSET": JOBSET}
  names |= {"RUN": (*POD, *TRAIN), "V5P": (*JOBSET, "--accelerator=v5p")}
  script, *words = line.split()
  done = call(script, *(a for w in words for a in names.get(w, (w,))))
  assert (done.returncode, done.stdout, read()) == (2, "", []), done
  assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
  assert parts in done.stderr


# What the commands hold.


def test_pod_create():
  def create(*flags):
    (words,) = dry_run("tpu_pod.sh", "create", *POD, *flags)
    return words

  words = create("--type=v6e-128", "--spot")
  assert words[:6] == "gcloud compute tpus tpu-vm create pod".split()
  assert {*words[6:]} == {
    *("--zone=us-east5-b", "--accelerator-type=v6e-128", "--spot"),
    "--version=v2-alpha-tpuv6e",
  }
  words = create("--type", "v4-8", "--queued")
  assert words[3:6] == ["queued-resources", "create", "pod"]
  assert "--runtime-version=tpu-ubuntu2204-base" in words
  assert "--spot" not in words
  words = create("--type=v9-3", "--runtime=mine")
  assert {"--version=mine", "--accelerator-type=v9-3"} <= set(words)


def test_pod_setup():
  archive, copy, unpack = dry_run("tpu_pod.sh", "setup", *POD)
  assert archive[-1] == "HEAD" and archive[-2].endswith(f"={copy[5]}")
  zone = "--zone=us-east5-b"
  assert copy[6:] == ["pod:drift_jax.tar.gz", zone, "--worker=all"]
  assert "--worker=all" in unpack and "--zone=us-east5-b" in unpack
  assert remote(unpack)[-4:] == ["&&", "bash", "launch/install.sh", "tpu"]
  (clone,) = dry_run(
    "tpu_pod.sh", "setup", *POD, "--repository=https://a/b c", "--ref=v1"
  )
  assert "--worker=all" in clone
  assert remote(clone)[9:13] == ["--quiet", "--depth=1", "https://a/b c", "v1"]
  assert remote(clone)[-4:] == ["&&", "bash", "launch/install.sh", "tpu"]


def test_pod_run():
  (words,) = dry_run(*("tpu_pod.sh", "run", *POD, *TRAIN, "--", "-v=1", "a b"))
  assert "--worker=all" in words and "--zone=us-east5-b" in words
  training = ["cd", "drift_jax", "&&", "bash", "launch/daemon.sh", "start"]
  training += [".venv/bin/python", "-m", "drift_jax.main"]
  training += [*TRAIN[:2], "--coordinator=auto", ODD, "-v=1", "a b"]
  assert remote(words) == training
  evaluation = (".venv/bin/python", "-m", "drift_jax.evaluate", ODD, "-v=1")
  (words,) = dry_run("tpu_pod.sh", "exec", *POD, "--", *evaluation)
  assert "--worker=all" in words
  assert remote(words) == ["cd", "drift_jax", "&&", *evaluation]
  workdir = "--workdir=/mnt/shared/it's a"
  (words,) = dry_run(
    *("tpu_pod.sh", "run", *POD, TRAIN[0], "--max-restarts=3", workdir)
  )
  assert remote(words)[3] == "MAX_RESTARTS=3" and workdir in remote(words)


def jobset(*arguments):
  """(manifest, spec of its job, spec of its pods, their container)."""
  printed = call("gke.sh", *JOBSET, *arguments, "--dry-run")
  assert printed.returncode == 0, printed.stderr
  subprocess.run(["bash", "-n"], input=printed.stdout, text=True, check=True)
  _, *lines, end = printed.stdout.splitlines()
  assert end == "END"
  document = yaml.safe_load("\n".join(lines))
  (job,) = document["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  return document, spec, pod, container


@pytest.mark.parametrize(
  ("accelerator", "topology", "more", "label", "hosts", "chips"),
  [
    ("v6e", "8x16", (), "tpu-v6e-slice", 32, 4),
    ("v6e", "1x1", (), "tpu-v6e-slice", 1, 1),
    ("v6e", "2x4", ("--chips-per-host=4",), "tpu-v6e-slice", 2, 4),
    ("v5p", "2x2x4", (), "tpu-v5p-slice", 4, 4),
  ],
)
def test_jobset(accelerator, topology, more, label, hosts, chips):
  _, spec, pod, container = jobset(
    f"--accelerator={accelerator}", f"--topology={topology}", *more
  )
  assert spec["parallelism"] == spec["completions"] == hosts
  gke = "cloud.google.com/gke-tpu-"
  assert pod["nodeSelector"] == {
    f"{gke}accelerator": label,
    f"{gke}topology": topology,
  }
  tpus = {"google.com/tpu": chips}
  assert container["resources"] == {"requests": tpus, "limits": tpus}


def test_jobset_restarts():
  """All pods at once, and not after an error that would come again."""
  document, job, pod, container = jobset(
    "--max-restarts=7", "--grace-seconds=90"
  )
  spec = document["spec"]
  assert spec["network"]["enableDNSHostnames"] is True
  rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  assert spec["failurePolicy"] == {"maxRestarts": 7, "rules": [rule]}
  assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
  disrupted, failed = job["podFailurePolicy"]["rules"]
  assert (disrupted["action"], failed["action"]) == ("Count", "FailJob")
  codes = failed["onExitCodes"]["values"]
  assert 1 in codes and not {0, 75, 134, 137, 143} & set(codes)
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] == 90
  assert failed["onExitCodes"]["containerName"] == container["name"]


def test_jobset_fills_in():
  document, _, pod, container = jobset()
  assert document["metadata"]["name"] == "b2"
  assert container["image"] == "host/drift_jax:tpu"
  assert container["command"] == ["python", "-m", "drift_jax.main"]
  arguments = [*TRAIN[:2], "--coordinator=auto", ODD]
  # Kubernetes makes $ of $$, before it looks for $(NAME).
  assert container["args"] == [a.replace("$", "$$") for a in arguments]
  assert "serviceAccountName" not in pod
  assert [v["name"] for v in pod["volumes"]] == ["shm"]

  document, _, pod, container = jobset(
    *("--name=yes", "--claim=disk", "--service-account=on", "--spot"),
    "--workdir=/data/runs",
  )
  assert document["metadata"]["name"] == "yes"  # and not True
  assert pod["serviceAccountName"] == "on"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "disk"}
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  assert mounts == {"shm": "/dev/shm", "data": "/data"}


# The loop.

RESTART = ("bash", str(LAUNCH / "restart.sh"), "bash", "-c")


@pytest.mark.parametrize(
  ("ends", "code", "starts"),
  [
    ("exit 0", 0, 1),
    ("exit 1", 1, 1),
    ("exit 75", 75, 3),
    ("exit 130", 130, 1),
    ("kill -KILL $$", 137, 3),
    ("[ -e again ] || { echo >again; exit 75; }", 0, 2),
  ],
)
def test_restart(tmp_path, ends, code, starts):
  done = subprocess.run(
    [*RESTART, f"echo >>starts; {ends}"],
    cwd=tmp_path,
    env=os.environ | {"MAX_RESTARTS": "2", "RESTART_DELAY": "0"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == code, done.stderr
  assert (tmp_path / "starts").read_text() == "\n" * starts
  assert f"exit code {code}" in done.stderr.splitlines()[-1]
  assert ("which is MAX_RESTARTS" in done.stderr) == (starts == 3)


@pytest.mark.parametrize(
  ("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_restart_forwards(tmp_path, sent, code):
  """Once, and then it waits for the code and does not start again.

  Python raises KeyboardInterrupt only if SIGINT was not ignored at its start.
  """
  program = f"""if True:
    import pathlib, signal, sys, time
    log = open("log", "a")
    def note(number, _):
      print("signal", file=log, flush=True)
      time.sleep(.3)
      sys.exit({code})
    signal.signal(signal.SIGTERM, note)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("started", file=log, flush=True)
    try:
      time.sleep(30)
    except KeyboardInterrupt:
      note(0, 0)
  """
  # A shell's background jobs ignore it, and so would all that they start.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  command = ["bash", LAUNCH / "restart.sh", sys.executable, "-c", program]
  process = subprocess.Popen(
    command, cwd=tmp_path, stderr=subprocess.PIPE, text=True
  )
  signal.signal(signal.SIGINT, before)
  log = tmp_path / "log"
  wait_for(lambda: log.exists() and log.read_text() == "started\n")
  process.send_signal(sent)
  wait_for(lambda: "signal" in log.read_text())
  process.send_signal(sent)
  _, said = process.communicate(timeout=10)
  assert process.returncode == code
  assert said.endswith(
    f"exit code {code} after {sent.name}: not started again\n"
  )
  assert said.count("\n") == 1 and log.read_text() == "started\nsignal\n"


def test_restart_is_stopped_between_starts(tmp_path):
  process = subprocess.Popen(
    [*RESTART, "echo >>starts; exit 75"],
    cwd=tmp_path,
    env=os.environ | {"RESTART_DELAY": "30"},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  assert "restart 1 of 100 in 30 s" in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  _, rest = process.communicate(timeout=10)  # nobody keeps stderr open
  assert process.returncode == 75 and "SIGTERM: not started again" in rest
  assert (tmp_path / "starts").read_text() == "\n"


def command_line(pid):
  """Empty of a process that has ended, a zombie or not."""
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  except OSError:
    return b""


def test_daemon(tmp_path):
  env = os.environ | {"DAEMON_FOLDER": str(tmp_path), "STOP_SECONDS": "20"}

  def daemon(*arguments):
    done = call("daemon.sh", *arguments, env=env, cwd=tmp_path)
    return done.returncode, done.stdout + done.stderr

  assert "not running" in daemon("status")[1]
  saves = "trap 'echo saved; exit 75' TERM; echo \"up $1\"; "
  sleeps = "while :; do sleep .05; done"
  log = tmp_path / "log"
  code, said = daemon("start", "bash", "-c", saves + sleeps, "_", "a 'b")
  assert code == 0 and "started process" in said
  wait_for(lambda: "up a 'b" in log.read_text())
  assert "running as process" in daemon("status")[1]
  code, said = daemon("start", "true")
  assert code == 2 and "a run is already there" in said
  code, said = daemon("stop")
  assert code == 0 and "exit code 75 after SIGTERM" in said
  assert "saved" in log.read_text()
  assert "not running. " in daemon("status")[1]
  assert "not running" in daemon("stop")[1]

  # One that does not want to end.
  env["STOP_SECONDS"] = "1"
  written = tmp_path / "pid_of_it"
  stays = f"trap '' TERM; echo $$ >pid_of_it; {sleeps}"
  assert daemon("start", "bash", "-c", stays)[0] == 0
  wait_for(lambda: written.is_file() and written.read_text())
  pid = int(written.read_text())
  try:
    code, said = daemon("stop")
    assert code == 0 and "killed, after 1 s" in said
    assert "not running" in daemon("status")[1]
    wait_for(lambda: not command_line(pid))
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


# Slurm, in the job.


def slurm_job(monkeypatch, code, **settings):
  monkeypatch.setenv("CODE_srun", str(code))
  settings = {"SLURM_JOB_ID": "42", "PYTHON": "py"} | settings
  for name, value in settings.items():
    monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
  ("code", "restarts", "requeues"),
  [
    *((0, 0, 0), (1, 0, 0), (75, 0, 1), (130, 0, 0), (134, 2, 1), (137, 0, 1)),
    (134, 3, 0),
  ],
)
def test_slurm_requeues(stand_in, monkeypatch, code, restarts, requeues):
  read = stand_in("srun", "scontrol")
  settings = {"SLURM_RESTART_COUNT": str(restarts), "MAX_RESTARTS": "3"}
  slurm_job(monkeypatch, code, **settings)
  done = call("slurm.sbatch", *TRAIN, cwd=ROOT)
  assert done.returncode == code
  ran, *after = read()
  assert ran[:3] == ["srun", "--kill-on-bad-exit=0", "--wait=300"]
  run = ("py", "-m", "drift_jax.main", *TRAIN, "--coordinator=auto")
  assert ran[4:] == [*run]
  assert after == [["scontrol", "requeue", "42"]] * requeues
  gave_up = "after 3 restarts, which is MAX_RESTARTS" in done.stderr
  assert gave_up == (restarts == 3)


def test_slurm_job_is_cancelled(stand_in, monkeypatch):
  """scancel sends SIGTERM to the batch shell too, which waits for the code."""
  read = stand_in("srun", "scontrol")
  slurm_job(monkeypatch, 75, SECONDS_srun=".5")
  command = ["bash", LAUNCH / "slurm.sbatch", *TRAIN]
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
  wait_for(read)
  process.send_signal(signal.SIGTERM)
  assert process.wait(10) == 75
  assert [words[0] for words in read()] == ["srun"]


def test_slurm_job_that_can_not_run(stand_in, monkeypatch, tmp_path):
  read = stand_in("srun", "scontrol")
  slurm_job(monkeypatch, 0)
  done = call("slurm.sbatch", *TRAIN, cwd=tmp_path)
  assert done.returncode == 2 and "is not the repository" in done.stderr
  monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
  monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h100:8")
  done = call("slurm.sbatch", *TRAIN, cwd=ROOT)
  assert done.returncode == 2 and read() == []
  assert "want as many processes as GPUs" in done.stderr


def test_slurm_submits_one_process_a_gpu(tmp_path):
  submit, step = dry_run(
    *("slurm.sbatch", "--nodes=4", "--gpus-per-node=h100:4", *TRAIN),
    cwd=tmp_path,
  )
  assert submit[0] == "sbatch" and step[0] == "srun"
  assert {f"--chdir={ROOT}", "--nodes=4", "--ntasks-per-node=4"} <= set(submit)
  assert "--gpus-per-node=h100:4" in submit
  assert submit[-4:] == [str(LAUNCH / "slurm.sbatch"), *TRAIN]
  assert step[-4:] == [*TRAIN, "--coordinator=auto"]
  text = (LAUNCH / "slurm.sbatch").read_text()
  assert {"--requeue", "--signal=TERM@120"} <= set(
    re.findall(r"^#SBATCH (\S+)$", text, re.M)
  )


# Environments.


OLD = """-m pip install --quiet --user uv
-m uv venv --quiet --seed --python 3.12 .venv"""


@pytest.mark.parametrize(
  ("python3", "made"),
  [(312, ["-m venv .venv"]), (310, OLD.splitlines())],
)
def test_install(programs, tmp_path, python3, made):
  """Where python3 is too old, a newer one is fetched."""
  stand_in = """#!/usr/bin/env bash
    case $* in
      -c*print*) echo 3.$((VERSION - 300)); exit ;;
      -c*) exit $((VERSION < 311)) ;;
      *venv*) mkdir -p .venv/bin; cp "$STAND_IN" .venv/bin/python ;;
    esac
    echo "$@" >>record
  """
  (programs / "python3").write_text(stand_in.replace("VERSION", str(python3)))
  (programs / "new").write_text(stand_in.replace("VERSION", "312"))
  (programs / "cp").symlink_to(shutil.which("cp", path=os.defpath) or "")
  for name in ("python3", "new"):
    (programs / name).chmod(0o755)
  shutil.copytree(LAUNCH, tmp_path / "launch")
  env = os.environ | {"STAND_IN": str(programs / "new")}
  env.pop("PYTHON", None)
  locked = "--constraint launch/locks/python3.12.txt"
  newest = "--upgrade --upgrade-strategy=eager"
  for arguments, versions, packages in (
    (["tpu"], locked, "jax[tpu] gcsfs"),
    (["--newest", "cuda13"], newest, "jax[cuda13] gcsfs"),
  ):
    script = tmp_path / "launch" / "install.sh"
    done = call(script, *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    # The second time, what was made is there.
    pip = "-m pip install --quiet --disable-pip-version-check"
    made = [*made, f"{pip} {versions} -r requirements.txt {packages}"]
    assert (tmp_path / "record").read_text().splitlines() == made


# The image.


def instructions():
  text = (LAUNCH / "Dockerfile").read_text()
  lines = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", text, flags=re.M))
  return [line.split(None, 1) for line in lines.splitlines() if line]


def test_image_copies_what_is_there():
  ignored = (ROOT / ".dockerignore").read_text().split()
  assert ignored[0] == "*"
  copied = [rest.split()[0] for name, rest in instructions() if name == "COPY"]
  assert sorted(copied) == sorted(i[1:] for i in ignored if i[0] == "!")
  assert all((ROOT / path).exists() for path in copied)
  assert any(fnmatch.fnmatch("a/__pycache__", i) for i in ignored[1:])
  users = [rest for name, rest in instructions() if name == "USER"]
  assert users and users[-1] not in ("0", "root")


def test_image_installs(stand_in, monkeypatch):
  read = stand_in("pip")
  monkeypatch.setenv("ACCELERATOR", "tpu")
  monkeypatch.setenv("PYTHON_VERSION", "3.12.4")  # of Python's own image
  line = next(rest for name, rest in instructions() if name == "RUN")
  subprocess.run(["/bin/sh", "-c", line], check=True)
  assert read() == [
    [
      *("pip", "install", "--no-cache-dir"),
      *("--requirement", "requirements.txt", "gcsfs"),
      *("--constraint", "launch/locks/python3.12.txt", "jax[tpu]"),
    ]
  ]
  monkeypatch.setenv("ACCELERATOR", "rocm")
  done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True)
  assert done.returncode == 2 and len(read()) == 1
  assert "'rocm': valid options are cpu cuda12 cuda13 tpu" in done.stderr


def test_docker_run(tmp_path):
  made, ran = dry_run(
    *("docker.sh", "run", TRAIN[0], ODD, "--workdir=my runs", "--data=images"),
    *("--gpus", "--image=drift_jax:cuda13"),
    cwd=tmp_path,
  )
  runs, images = tmp_path / "my runs", tmp_path / "images"
  assert made == ["mkdir", "-p", str(runs)]
  assert {
    "--gpus=all",
    f"--user={os.getuid()}:{os.getgid()}",
    f"--mount=type=bind,source={runs},target={runs}",
    f"--mount=type=bind,source={images},target={images},readonly",
  } <= set(ran)
  assert ran[ran.index("drift_jax:cuda13") + 1 :] == [
    *("bash", "launch/restart.sh", "python", "-m", "drift_jax.main"),
    *(TRAIN[0], f"--workdir={runs}", ODD),
  ]


# What measures a GPU.


@pytest.mark.parametrize(
  ("line", "code"), [("--help", 0), ("out -h", 0), ("--tiny", 2), ("", 2)]
)
def test_gpu_check_begins_nothing(tmp_path, line, code):
  script = ROOT / "benchmarks" / "gpu_check.sh"
  done = call(script, *line.split(), cwd=tmp_path)
  assert done.returncode == code
  told = done.stderr if code else done.stdout
  assert "gpu_check.sh OUT [DATA]" in told or "want OUT [DATA]" in told
  assert not (ROOT / "out").exists()
