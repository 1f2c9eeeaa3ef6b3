#!/usr/bin/env bash
# Brings the fleet of compose.yaml up, waits until it serves, and leaves what an operator needs in .vfleet/:
# a certificate, and in `env` where the coordinators are.
#
#   up.sh          brings it up
#   up.sh down     ends it; what it has on disk stays, for the next time
#   up.sh destroy  ends it, and nothing of it stays
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
own=$here/../..
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-vfleet}
if docker compose version >/dev/null 2>&1; then
    compose=(docker compose --file "$here/compose.yaml")
else
    compose=(docker-compose --file "$here/compose.yaml")
fi

case ${1:-up} in
down) exec "${compose[@]}" down ;;
destroy)
    "${compose[@]}" down --volumes
    rm -rf "$own/.vfleet"
    exit
    ;;
esac

images=$("$here/../docker/images.sh")
set -a
eval "$images"
set +a
"${compose[@]}" up --detach

deadline=$((SECONDS + 300))
for service in etcd1 etcd2 etcd3 c1 c2 h1 h2 h3; do
    until [ "$(docker inspect --format '{{.State.Health.Status}}' "$("${compose[@]}" ps --quiet $service)")" = healthy ]; do
        if [ $SECONDS -gt $deadline ]; then
            echo "$service does not serve:" >&2
            "${compose[@]}" logs --tail 5 $service >&2
            exit 1
        fi
        sleep 0.5
    done
done

rm -rf "$own/.vfleet"
mkdir -p "$own/.vfleet"
docker cp "$("${compose[@]}" ps --all --quiet certs)":/certs/operator "$own/.vfleet/operator"
network=${VFLEET_CONTROL:-172.30.1}
cat >"$own/.vfleet/env" <<EOF
export VFLEET_COORDINATOR=$network.21:7000,$network.22:7000
export VFLEET_TLS=$(readlink -f "$own/.vfleet/operator")
EOF
echo 'The fleet is up: . .vfleet/env'
