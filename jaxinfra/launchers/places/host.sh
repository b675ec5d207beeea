# What the launching machine does on a host: `ssh HOST "sh -c SCRIPT host WORKDIR LENGTH ACTION [ARGUMENT ...]"`, with
# LENGTH bytes on standard input. POSIX sh, with flock of util-linux, tar and setsid. Below WORKDIR, ~/.cache/jaxinfra by default, lie
#   bundles/HASH/         code                       bin/uv-VERSION  the uv that installs
#   environments/HASH/    Python and packages        runs/HOST/RUN/  one run: attempt, console-ATTEMPT.log, exit
# On a login node of Slurm a run's folder is runs/slurm/RUN/, which all nodes see; it also has the job's script and number.
# What is complete has its final name: a transfer that was cut off leaves nothing that counts.
set -eu
umask 077
base=$1
length=$2
action=$3
shift 3
echo "--- jaxinfra" # what comes before is a greeting of the host
[ -n "$base" ] || base=$HOME/.cache/jaxinfra
case $base in "~/"*) base=$HOME/${base#"~/"} ;; esac
runs=$base/runs/$(uname -n) # of this host: several may share a home
mkdir -p "$base/bundles" "$base/environments" "$base/bin" "$runs"

fail() {
    echo "$1" >&2
    exit 64
}

# Writes standard input to a new file; a transfer that was cut off fails.
take() {
    cat >"$1"
    [ "$(wc -c <"$1")" -eq "$length" ] || { rm -f "$1" && fail "the transfer was cut off"; }
}

# The runner holds a lock on this file for as long as it lives; a boot releases it, too.
is_live() {
    ! flock -n -s "$runs/$1/alive" true
}

attempt_of() {
    number=$(cat "$runs/$1/attempt" 2>/dev/null || true)
    echo "${number:-0}"
}

set_attempt() {
    echo "$2" >"$runs/$1/attempt.new"
    mv "$runs/$1/attempt.new" "$runs/$1/attempt"
}

state_of() {
    folder=$runs/$1
    attempt=$(attempt_of "$1")
    if [ -e "$folder/alive" ] && is_live "$1"; then
        echo "$attempt live -"
    elif [ -e "$folder/exit" ]; then
        echo "$attempt ended $(cat "$folder/exit")"
    elif [ "$attempt" != 0 ]; then
        echo "$attempt killed -"
    else
        echo "0 none -"
    fi
}

# The state of a job in Slurm's words, and why, such as "RUNNING None node[1-4]"; "" if it has ended. Fails without an answer.
job_said() {
    squeue --noheader --jobs="$(cat "$runs/$1/job")" --format='%T %r %N' 2>"$runs/$1/squeue.err" ||
        grep -q "Invalid job id" "$runs/$1/squeue.err"
}

job_is_live() {
    case $(job_state "$1" | tail -n 1) in *" live "* | *" away "*) return 0 ;; esac
    return 1
}

# Two lines: one for people, and as state_of.
job_state() {
    folder=$runs/$1 attempt=$(attempt_of "$1")
    [ -e "$folder/job" ] || { echo "no job" && echo "0 none -" && return; }
    job=$(cat "$folder/job")
    if ! said=$(job_said "$1"); then
        echo "Slurm does not answer: $(tail -n 1 "$folder/squeue.err")" && echo "$attempt away -"
    elif [ -n "$said" ]; then
        echo "job $job is $said" | sed 's/ None / /' && echo "$attempt live -"
    elif [ -e "$folder/exit" ]; then
        echo "job $job has ended" && echo "$attempt ended $(cat "$folder/exit")"
    elif scontrol show job "$job" 2>/dev/null | grep -qE 'JobState=(FAILED|TIMEOUT|OUT_OF_MEMORY|NODE_FAIL|BOOT_FAIL)'; then
        echo "job $job has failed" && echo "$attempt killed -"
    else
        echo "job $job was canceled" && echo "$attempt ended 130"
    fi
}

# Why Slurm takes no job here: what it says, or what is missing; "" if it answers.
slurm_problem() {
    for program in sbatch squeue scancel scontrol; do
        command -v "$program" >/dev/null || { echo "$program: not found" && return; }
    done
    said=$(timeout 20 squeue --noheader --me --format=%A 2>&1) || echo "${said:-squeue: no answer within 20 s}" | head -n 1
}

case $action in submit | job-*) runs=$base/runs/slurm ;; esac # login nodes share it
case $action in
probe) # RUN BUNDLE ENVIRONMENT UV PLACE: facts, a line each
    echo "arch=$(uname -m)"
    echo "system=$(uname -s)"
    echo "free_kb=$(df -Pk "$base" | awk 'NR == 2 {print $4}')"
    echo "address=$(hostname -I 2>/dev/null | awk '{print $1}')"
    echo "gpus=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | paste -sd ';' - || true)"
    echo "tpus=$(ls -d /dev/accel[0-9]* /dev/vfio/[0-9]* 2>/dev/null | wc -l)"
    echo "bundle=$([ -d "$base/bundles/$2" ] && echo yes || echo no)"
    echo "environment=$([ -e "$base/environments/$3/.complete" ] && echo yes || echo no)"
    echo "uv=$([ -x "$base/bin/uv-$4" ] && echo yes || echo no)"
    [ "$5" != slurm ] || echo "slurm=$(slurm_problem)"
    [ ! -d "$runs/$1" ] || touch "$runs/$1/looked" # a host that is about to delete itself waits
    others=
    for folder in "$runs"/*/; do
        run=$(basename "$folder")
        [ "$run" = "$1" ] || [ ! -e "$folder/alive" ] || ! is_live "$run" || others="$others $(cat "$folder/location")"
    done
    echo "others=$others"
    ;;
unpack) # BUNDLE: a tar archive on standard input
    [ -d "$base/bundles/$1" ] && { cat >/dev/null && exit; }
    new=$(mktemp -d "$base/bundles/.new-XXXXXX")
    take "$new.tar"
    tar -xzf "$new.tar" -C "$new" && rm "$new.tar" && chmod 755 "$new" && { mv -T "$new" "$base/bundles/$1" 2>/dev/null || rm -rf "$new"; }
    [ -d "$base/bundles/$1" ] || fail "the code was not unpacked"
    ;;
receive) # FILE: a program or file on standard input
    mkdir -p "$(dirname "$base/$1")"
    new=$(mktemp "$base/.new-XXXXXX")
    take "$new"
    chmod 700 "$new"
    mv -f "$new" "$base/$1"
    ;;
install) # ENVIRONMENT UV PYTHON: variables on standard input; the requirements were received before
    folder=$base/environments/$1
    mkdir -p "$folder"
    exec 8>"$folder.lock" # uv has a lock of its own inside
    flock 8
    [ -e "$folder/.complete" ] && exit
    set -a
    eval "$(cat)"
    set +a
    export UV_CACHE_DIR="${UV_CACHE_DIR:-$base/uv}" UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-$base/pythons}"
    export UV_LINK_MODE="${UV_LINK_MODE:-hardlink}"
    # Offline is for packages: uv would not even copy a Python from a mirror on a disk, file:///.
    env -u UV_OFFLINE "$base/bin/uv-$2" venv --quiet --allow-existing --python "$3" "$folder" 8>&-
    "$base/bin/uv-$2" pip install --quiet --python "$folder/bin/python" -r "$folder/requirements.txt" 8>&-
    touch "$folder/.complete"
    ;;
start) # RUN ATTEMPT BUNDLE ENVIRONMENT LOCATION: the job on standard input, which lies in no file: it has secrets
    folder=$runs/$1
    mkdir -p "$folder"
    exec 9>"$folder/lock" 3<&0
    flock 9
    [ "$(attempt_of "$1")" -lt "$2" ] || { state_of "$1" && exit; }
    touch "$folder/alive"
    ! is_live "$1" || fail "an earlier start of this run is still ending"
    echo "$5" >"$folder/location"
    rm -f "$folder/exit"
    set_attempt "$1" "$2"
    cd "$base/bundles/$3"
    PYTHONPATH=$PWD setsid nohup "$base/environments/$4/bin/python" -m jaxinfra.launchers.places.on_host \
        "$folder" "$length" <&3 >>"$folder/console-$2.log" 2>&1 8>&- 9>&- &
    child=$!
    exec 3<&-
    while ! is_live "$1" && [ ! -e "$folder/exit" ]; do
        kill -0 "$child" 2>/dev/null || fail "the process ended at once: $(tail -n 1 "$folder/console-$2.log")"
        sleep 0.05
    done
    state_of "$1"
    ;;
status) # RUN
    state_of "$1"
    ;;
follow) # RUN LINES FOLLOW: the console of the last attempt, as tail -n LINES, then until it ends
    folder=$runs/$1
    console=$folder/console-$(attempt_of "$1").log
    [ -e "$console" ] || exit 3
    if [ "$3" = yes ] && is_live "$1"; then exec tail -n "$2" -f --pid "$(cat "$folder/pid")" "$console"; fi
    exec tail -n "$2" "$console"
    ;;
stop) # RUN ATTEMPT SIGNAL: of this attempt alone; if it has not started here, it never will
    folder=$runs/$1
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    [ "$(attempt_of "$1")" -ge "$2" ] || set_attempt "$1" "$2"
    if [ "$(attempt_of "$1")" = "$2" ] && [ -e "$folder/alive" ] && is_live "$1"; then
        pid=$(cat "$folder/pid")
        target=$pid
        [ "$3" != KILL ] || target=-$pid # with all that it has started
        kill "-$3" "$target" 2>/dev/null || ! kill -0 "$pid" 2>/dev/null || fail "process $pid was not reached"
    fi
    ;;
read) # FILE of a run directory on this host's disk; 3: missing
    [ -e "$1" ] || exit 3
    cat "$1"
    ;;
create) # FILE: a new file from standard input; 3: there is one
    mkdir -p "$(dirname "$1")"
    new=$(mktemp "$(dirname "$1")/.new-XXXXXX")
    take "$new"
    ln "$new" "$1" 2>/dev/null || { rm -f "$new" && exit 3; }
    rm -f "$new"
    ;;
submit) # RUN ATTEMPT LOCATION: a job for Slurm; script and variables on standard input, as NAME='value'
    folder=$runs/$1
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    [ "$(attempt_of "$1")" -lt "$2" ] || { job_state "$1" && exit; }
    told=$(cat && echo .) # the dot keeps the last line's end
    [ "$(printf %s "${told%.}" | wc -c)" -eq "$length" ] || fail "the transfer was cut off"
    case $base$folder in *[!A-Za-z0-9_./+@:,=-]*) fail "$base: sbatch needs a plain path; use another --workdir" ;; esac
    eval "${told%.}"
    printf %s "$script" | sed "s|@BASE@|$base|g; s|@RUN@|$folder|g" >"$folder/job-$2.sh"
    echo "$3" >"$folder/location"
    rm -f "$folder/exit" "$folder/failures"
    job=$(squeue --noheader --me --name="$1-$2" --format=%A) # of an attempt that was cut off here
    sbatch=$(command -v sbatch) || fail "sbatch: not found; this is no login node of Slurm"
    [ -n "$job" ] || job=$(eval "$exports" && "$sbatch" --parsable "$folder/job-$2.sh") || exit 64
    echo "${job%%;*}" >"$folder/job"
    set_attempt "$1" "$2"
    job_state "$1"
    ;;
job-status) # RUN
    job_state "$1"
    ;;
job-follow) # RUN LINES FOLLOW LOG: the console of the last attempt, or a log, as `follow`
    console=${4:-$runs/$1/console-$(attempt_of "$1").log}
    for _ in 1 2 3 4 5 6; do # then whoever follows connects again
        [ "$3" = yes ] && [ ! -e "$console" ] && job_is_live "$1" || break
        sleep 5
    done
    [ -e "$console" ] || exit 3
    [ "$3" = yes ] && job_is_live "$1" || exec tail -n "$2" "$console"
    tail -n "$2" -F "$console" 2>/dev/null &
    tail=$!
    trap 'kill $tail; exit' INT TERM HUP
    while job_is_live "$1" && kill -0 "$tail" 2>/dev/null; do sleep 5; done
    sleep 1
    kill "$tail" 2>/dev/null || true
    ;;
job-stop) # RUN ATTEMPT SIGNAL
    folder=$runs/$1
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    [ "$(attempt_of "$1")" -ge "$2" ] || set_attempt "$1" "$2"
    touch "$folder/stopped-$2" # so that the job is not queued again
    if [ "$(attempt_of "$1")" = "$2" ] && job_is_live "$1"; then
        case $3:$(job_said "$1" || true) in
        TERM:*RUNNING*) scancel --signal=TERM "$(cat "$folder/job")" ;;
        *) scancel "$(cat "$folder/job")" ;;
        esac
    fi
    ;;
*)
    fail "$action: no such action"
    ;;
esac
