#!/usr/bin/env bash
# Builds the programs that tests run and that Debian has no packages of, from their Go modules: Traefik and DevPod.
# Kept in ~/.cache/cluster-code-tests (tests/programs.py looks there); about 10 minutes of CPU time, once.
set -euo pipefail

TRAEFIK=v3.6.12
DEVPOD=v0.6.15

kept=${XDG_CACHE_HOME:-$HOME/.cache}/cluster-code-tests
mkdir -p "$kept"
# Whoever needs a program waits for as long as this is held.
exec 9>"$kept/building"
flock 9

# Unoptimised, and with a collector that never runs: half the CPU time. Static, since DevPod copies itself into containers.
export CGO_ENABLED=0 GOGC=off GOFLAGS=-mod=mod GOTOOLCHAIN=local
scratch=$(mktemp -d "$kept/build-XXXXXX")
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT

# fetch MODULE VERSION FOLDER: the module's source, to be changed.
fetch() {
    local source
    source=$(cd "$scratch" && go mod download -json "$1@$2" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p')
    [ -n "$source" ] || { echo "The module $1@$2 cannot be had." >&2; exit 1; }
    cp -r "$source" "$scratch/$3"
    chmod -R u+w "$scratch/$3"
}

# build NAME VERSION FOLDER PACKAGE LDFLAGS
build() {
    (cd "$scratch/$3" && go build -gcflags='all=-N -l' -ldflags="-s -w $5" -o "$scratch/program" "$4")
    mv "$scratch/program" "$kept/$1-$2"
}

if [ ! -x "$kept/traefik-$TRAEFIK" ]; then
    fetch github.com/traefik/traefik/v3 "$TRAEFIK" traefik
    # The clients of a hundred DNS services, for certificates: half of all that would be compiled.
    lego=$(cd "$scratch/traefik" && go list -m -f '{{.Version}}' github.com/go-acme/lego/v4)
    fetch github.com/go-acme/lego/v4 "$lego" lego
    cat >"$scratch/lego/providers/dns/zz_gen_dns_providers.go" <<'GO'
package dns

import (
	"fmt"

	"github.com/go-acme/lego/v4/challenge"
)

func NewDNSChallengeProviderByName(name string) (challenge.Provider, error) {
	return nil, fmt.Errorf("built without the DNS provider %s", name)
}
GO
    (cd "$scratch/traefik" && go mod edit -replace github.com/go-acme/lego/v4=../lego)
    build traefik "$TRAEFIK" traefik ./cmd/traefik ""
fi

if [ ! -x "$kept/devpod-$DEVPOD" ]; then
    fetch github.com/loft-sh/devpod "$DEVPOD" devpod
    # What it would vendor is incomplete in the module.
    rm -rf "$scratch/devpod/vendor"
    build devpod "$DEVPOD" devpod . "-X github.com/loft-sh/devpod/pkg/version.version=$DEVPOD"
fi
