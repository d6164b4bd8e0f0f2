#!/usr/bin/env bash
# One command for the whole comparison: see README.md. Repetitions outside, peers inside: A B C A B C, as the machine drifts.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export BENCH_DIR=${BENCH_DIR:-$PWD/bench-work}
results=$BENCH_DIR/results/$(date +%Y%m%d-%H%M%S)
all_phases=import,start1,start5,start20,latency,latency1cpu,latency2cpu,throughput,many,bulk,rss,pi
mkdir -p "$results"
unset PYTHONDONTWRITEBYTECODE # Without cached bytecode a start measures the compiler.

for repetition in $(seq "${REPS:-3}"); do
    out=$results/rep-$repetition.jsonl
    for phase in $(echo "${PHASES:-$all_phases}" | tr , ' '); do
        echo "== repetition $repetition: $phase" >&2
        for script in floor bigmachine; do
            PHASES=$phase "$python" "$here/bench_$script.py" >>"$out"
        done
        if [ -x "${BENCH_PEERS:-}/run_all.sh" ]; then # Their floor is ours; name it in BENCHES to compare the two.
            PHASES=$phase RUNS=1 BENCHES=${BENCHES:-stdlib,rpyc,grpc,h2,zmq,ray,dask} BENCH_DIR=$BENCH_DIR/peers \
                "$BENCH_PEERS/run_all.sh" >>"$out"
        fi
    done
done

{
    echo "$(uname -srm), $("$python" -c 'import os, platform, ssl; print(f"{os.cpu_count()} processors, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}")')"
    echo
    "$python" "$here/table.py" "$results"/rep-*.jsonl
} | tee "$results/table.md"
echo "written to $results" >&2
