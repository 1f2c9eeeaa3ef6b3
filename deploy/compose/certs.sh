#!/bin/sh
# Run in the service `certs`: a CA for a trial and the certificates of the fleet, each in a volume of its own. What is
# there already stays. $1 is the first three bytes of the addresses of the network of control.
set -eu
owner=65532:65532

issue() { # FOLDER ROLE NAME [OPTION…]
    folder=/certs/$1
    shift
    if [ ! -e "$folder/tls.crt" ]; then
        vfleet certs issue "$@" --ca /certs/ca --out "$folder" --days 365
        chown -R "$owner" "$folder"
    fi
}

[ -e /certs/ca/ca.crt ] || vfleet certs init /certs/ca
for n in 1 2 3; do
    issue "etcd$n" etcd "etcd$n" --dns "etcd$n" --ip "$1.1$n" --ip 127.0.0.1
    issue "h$n" host "h$n"
done
for n in 1 2; do
    issue "c$n" coordinator "c$n"
done
issue operator operator person
