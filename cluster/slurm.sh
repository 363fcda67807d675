#!/usr/bin/env bash
# A run on the nodes of a Slurm allocation: Ray on all of them, the driver on the first.
#
#     sbatch --job-name=first --nodes=4 cluster/slurm.sh tasks/arithmetic.toml learner.steps=600
#
# The run has the job's name. One of that name that is there already goes on: the same line
# submitted again is a resumption. Before the time limit the run checkpoints and ends in order, and
# the job is queued again. docs/cluster.md tells the whole way.
#
# Whole nodes: Ray's ports and memory are not made to be shared with other people's jobs.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
# USR1 to this script alone, five minutes before the limit: more than cluster.stop_timeout_s and
# what Slurm may be late or early by, a minute.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, in the folder of the project}"
name=$SLURM_JOB_NAME
# Runs, the project and its Python lie on a file system that every node has.
export AMORTIZE_RUNS=${AMORTIZE_RUNS:-$PWD/runs}
python=${AMORTIZE_PYTHON:-$PWD/.venv/bin/python}
ray=${python%/*}/ray
sessions=/tmp/ray-$SLURM_JOB_ID  # of Ray, on each node

# Whoever has the token may run code in this allocation; srun hands the environment on.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

steps=()
leave() {
    for step in "${steps[@]}"; do kill "$step" 2> /dev/null || true; done
    wait "${steps[@]}" || true
    srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" rm -rf "$sessions" || true
}
trap leave EXIT

cpus=--num-cpus=$SLURM_CPUS_ON_NODE
srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "$ray" start --block --head "$cpus" \
    --port=$((20000 + SLURM_JOB_ID % 10000)) --temp-dir="$sessions" --include-dashboard=false &
steps+=($!)
# Ray writes down where the others reach it.
until address=$(cat "$sessions/ray_current_cluster" 2> /dev/null) && [ -n "$address" ]; do
    kill -0 "${steps[0]}" || exit 1
    sleep 1
done
if ((SLURM_NNODES > 1)); then
    others=$((SLURM_NNODES - 1))
    srun --nodes=$others --ntasks=$others --exclude="$SLURMD_NODENAME" \
        "$ray" start --block --address="$address" "$cpus" &
    steps+=($!)
fi
"$python" - "$address" "$SLURM_NNODES" << 'PYTHON'
import sys, time
import ray

address, nodes = sys.argv[1], int(sys.argv[2])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) < nodes:
    if time.monotonic() > deadline:
        sys.exit(f"Ray is not up on all {nodes} nodes after 300 s")
    time.sleep(1)
PYTHON

# A run that is in a bucket and not here goes on too.
fetch='import sys; from cluster.run import directory, mirror'
fetch+='; mirror.fetch(directory.RunDirectory(sys.argv[1]))'
[ -z "${AMORTIZE_BUCKET:-}" ] || "$python" -c "$fetch" "$name"
resume=()
[ -e "$AMORTIZE_RUNS/$name" ] && resume=(--resume)
"$python" -m cluster train "$@" --run "$name" --address "$address" "${resume[@]}" &
driver=$!
again=
trap 'again=yes; kill -TERM $driver' USR1  # an orderly end
trap 'kill -TERM $driver' TERM
while :; do # a signal ends `wait`, not what it waits for
    status=0
    wait "$driver" || status=$?
    kill -0 "$driver" 2> /dev/null || break
done
trap - EXIT
leave
if [ "$again" ] && ! grep -qs '"phase": "done"' "$AMORTIZE_RUNS/$name/state.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
