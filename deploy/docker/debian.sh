# Sourced: what a Debian machine's own apt knows about its mirror, without changing what it knows.

# The mirror from which this machine gets a release, or nothing.
debian_mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Identifier: Packages' |
        awk -v release="$1" '$2 == release { print $1; exit }'
}

# debian_unpack SUITE FOLDER PACKAGE…: packages of the release, verified by apt and unpacked into a folder, not installed.
debian_unpack() {
    local suite=$1 folder=$2 mirror state
    shift 2
    mirror=$(debian_mirror "$suite")
    [ -n "$mirror" ] || { echo "the apt sources of this machine name no mirror of $suite" >&2; return 1; }
    state=$(mktemp -d)
    mkdir -p "$state/lists/partial" "$state/archives/partial" "$folder"
    echo "deb $mirror $suite main" >"$state/sources.list"
    local apt=(apt-get -q -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state" -o APT::Sandbox::User=root)
    (
        trap 'rm -rf "$state"' EXIT
        "${apt[@]}" update && cd "$state" && "${apt[@]}" download "$@"
        for package in *.deb; do dpkg-deb -x "$package" "$folder"; done
    )
}
