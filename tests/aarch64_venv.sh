#!/bin/sh
# tests/aarch64_venv.sh FOLDER TORCH HOST: makes FOLDER/bin/python, a Python of AArch64 with torch and pytest, which the emulator
# qemu-user runs on any machine. It is Debian's, unpacked below FOLDER and not installed; HOST, a Python of this machine, fetches wheels.
#
# The programs that it starts are not emulated: so setup.py builds for AArch64 as it does there, by a cross compiler at full speed.
set -eu
for tool in qemu-aarch64 aarch64-linux-gnu-g++ apt-get dpkg; do
  command -v $tool > /dev/null || {
    echo "make test-neon: there is no $tool here. It runs on Debian: apt-get install qemu-user g++-aarch64-linux-gnu" >&2
    exit 1
  }
done

mkdir -p "$1/bin" "$1/apt/lists/partial" "$1/apt/archives/partial" "$1/root"
here=$(cd "$1" && pwd) torch=$2 host=$3

cat > "$here/apt/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
Dir::State::Lists "$here/apt/lists";
Dir::State::status "/dev/null";
Dir::Cache "$here/apt";
Debug::NoLocking "true";
END
export APT_CONFIG="$here/apt/apt.conf"
apt-get -qq update
apt-get -qq -y --no-install-recommends --download-only install python3-minimal libpython3-stdlib libpython3-dev libstdc++6
for package in "$here"/apt/archives/*.deb; do dpkg -x "$package" "$here/root"; done
unset APT_CONFIG

python=$(basename "$here"/root/usr/include/python3.*)
# Debian's pyconfig.h includes one for every architecture, from the folder above.
ln -sfn ../aarch64-linux-gnu "$here/root/usr/include/$python/aarch64-linux-gnu"
# A virtual environment, but that its python is this script. Torch's wheel has instructions that older cores lack; what the cross
# compiler makes, for ARMv8-A, has none. NEON_CPU names another core.
echo "home = $here/root/usr/bin" > "$here/pyvenv.cfg"
cat > "$here/bin/python" <<END
#!/bin/sh
export CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ CPATH="$here/root/usr/include/$python"
exec qemu-aarch64 -cpu "\${NEON_CPU:-neoverse-n1}" -L "$here/root" -0 "$here/bin/python" "$here/root/usr/bin/$python" "\$@"
END
chmod +x "$here/bin/python"

# uv asks what a package needs for AArch64; pip would ask for the machine that it runs on.
"$host" -m venv "$here/uv"
"$here/uv/bin/pip" install -q uv
"$here/uv/bin/uv" pip install -q --python-platform aarch64-manylinux_2_28 --python-version "${python#python}" --only-binary :all: \
  --target "$here/lib/$python/site-packages" "$torch" numpy pytest "setuptools>=77"
