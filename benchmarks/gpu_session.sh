#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes, on a machine that cannot download anything.
#
#   benchmarks/gpu_session.sh OUT [WHEELS [CUBINS]]
#
# OUT     folder for the rows (<device>.jsonl), summary.txt, and logs.tar.gz with a trace: few files, easy to move
# WHEELS  folder of wheels that the machine lacks (av, kornia, kornia_rs; pydantic, pydantic_core, annotated_types and
#         typing_inspection for farms), to be installed beside the project
# CUBINS  made by "python -m gpupipe.benchmarks.gluon_cubins build CUBINS" on another machine, if Triton here is too old
#
# A part that fails or takes too long does not stop the others; the summary names it, and the exit status is then 1.
# What is done when the call itself is cut off is in OUT. compute-sanitizer is used where it is installed.
# PYTHON is the interpreter (default: python3) and MINUTES the time limit of the whole (9). PARTS="bench_compile trace"
# runs only these parts, in a second call: the last ones may find no time left in the first. GPUPIPE_COMMIT names the
# commit for the rows where the files came without .git. The kernels' ahead-of-time report needs no GPU and is not here.
set -u

out=$(mkdir -p "${1:?expected OUT, see the head of this file}" && cd "$1" && pwd) || exit 2
wheels=${2:+$(realpath "$2")}
cubins=${3:+$(realpath "$3")}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
deadline=$((SECONDS + ${MINUTES:-9} * 60))
layout=$(mktemp -d) || exit 2
logs=$layout/logs
mkdir -p "$logs"
trap 'rm -rf "$layout"' EXIT
failed=()
: >"$out/summary.txt"

export PYTHONPATH="$root:$layout/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 GPUPIPE_FAIL_WITHOUT_CUDA=1
cd "$layout" || exit 1

part() { # name, seconds it may take, command …
    local name=$1 limit=$2 begin=$SECONDS left status
    shift 2
    case " ${PARTS:-$name} wheels scene " in *" $name "*) ;; *) return ;; esac
    left=$((deadline - SECONDS))
    if ((left <= 0)); then
        failed+=("$name (no time left)")
        return
    fi
    # SIGINT, so that pytest still reports what has failed, once the kernel that it is compiling is done.
    timeout --signal=INT --kill-after=20 "$((limit < left ? limit : left))" "$@" >"$logs/$name.log" 2>&1
    status=$?
    ((status == 0)) || failed+=("$name (exit status $status, see $name.log)")
    printf '%-16s %4d s  %s\n' "$name" $((SECONDS - begin)) "$([ $status = 0 ] && echo ok || echo "FAILED: $status")" |
        tee -a "$out/summary.txt"
    # After each part: whoever stops the whole call leaves no time for it.
    tar czf "$layout/logs.tar.gz" -C "$layout" logs && mv "$layout/logs.tar.gz" "$out/logs.tar.gz"
}

if [ -n "$wheels" ]; then
    part wheels 60 "$python" -m pip install --quiet --no-index --no-deps --target "$layout/site" "$wheels"/*.whl
fi
part machine 60 "$python" -c '
import torch, triton, gpupipe
from gpupipe.kernels.common_triton import can_pipeline
from gpupipe.kernels.dispatch import backend
slow = "" if can_pipeline(torch.device("cuda", 0)) else ": too old to pipeline here, so the fused engine is slower than it can be"
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "torch", torch.__version__, "triton", triton.__version__ + slow)
assert backend("cuda") == "triton", backend("cuda")'
nvidia-smi -q >"$logs/nvidia-smi.log" 2>&1 # clocks, power, ECC

# A kernel NAME has tests/test_NAME_triton.py and benchmarks/bench_NAME.py: to add a kernel, add its name here.
kernels=(crop_resize paste_blend nv12 inverted_residual)
alone=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q -rfE)
pytest=("${alone[@]}")
# A test spends most of its time compiling its kernel on one core, and there are many cores to one GPU.
"$python" -c 'import xdist' 2>/dev/null && pytest+=(-n 8)
tests=()
for name in "${kernels[@]}"; do tests+=("$root/tests/test_${name}_triton.py"); done
part tests 120 "${pytest[@]}" "${tests[@]}"
mapfile -t marked < <(grep -l 'mark\.cuda' "$root"/tests/test_*.py | grep -v -F -f <(printf '%s\n' "${tests[@]}"))

# The network, end to end, and stage by stage at real shapes: 1280×720, full-width network of random weights.
gpupipe=("$python" -c 'from gpupipe.cli import main; main()')
scene=$layout/bundled-1280x720
part scene 60 "$python" -m gpupipe.benchmarks.scenario "$scene" --size 1280x720
mv "$scene/template" "$scene/bundled-1280x720" 2>/dev/null # rows name a template by its folder
clip=(--template "$scene/bundled-1280x720" --audio-features "$scene/features.npy" --audio "$scene/speech.flac")
bench=("${gpupipe[@]}" bench --device cuda "${clip[@]}" --results "$out")
unet=("$python" -m gpupipe.benchmarks.bench_unet --device cuda --rounds 10 --record --results "$out")
part bench_unet 90 "${unet[@]}" --batch 64 1 --precision float16 --engine gluon fused eager
part bench_end_to_end 150 "${bench[@]}" --frames 600 --rounds 2 --record
overlap=("$python" -m gpupipe.benchmarks.bench_overlap --device cuda "${clip[@]}" --frames 600 --rounds 2 --record
    --results "$out")
part bench_overlap 60 "${overlap[@]}"
part bench_mjpeg 45 "${overlap[@]}" --codec mjpeg
part tests_cuda 150 "${pytest[@]}" -m cuda "${marked[@]}"
part precision 40 "$python" -m gpupipe.benchmarks.precision --device cuda --record --results "$out"
for name in "${kernels[@]}"; do
    part "bench_$name" 75 "$python" -m "gpupipe.benchmarks.bench_$name" --device cuda --record --results "$out"
done
if [ -n "$cubins" ]; then
    part bench_gluon 75 "$python" -m gpupipe.benchmarks.gluon_cubins run "$cubins" --record --results "$out"
fi
part bench_batches 90 "${bench[@]}" --sweep batch --values 64,16,128 --frames 1200 --rounds 2 --record
part trace 45 "${bench[@]}" --profile "$logs/trace.json"
# What torch.compile tunes takes minutes; ONNX Runtime's providers for a GPU take part where they are installed.
part bench_compile 300 "${unet[@]}" --batch 64 --precision float16 --engine fused compile onnxruntime
part bench_tiles 270 "$python" -m gpupipe.benchmarks.bench_tiles --seconds 200 --record --results "$out"
if command -v compute-sanitizer >/dev/null; then
    part sanitizer 300 compute-sanitizer --error-exitcode 9 "${alone[@]}" "$root/tests/test_render_on_gpu.py" -k own_kernels
fi

{
    echo
    tail -q -n 1 "$logs"/machine.log "$logs"/tests*.log 2>/dev/null
    cat "$logs"/bench_*.log 2>/dev/null
    if ((${#failed[@]})); then
        printf 'FAILED: %s\n' "${failed[@]}"
    fi
} | tee -a "$out/summary.txt"
((${#failed[@]} == 0))
