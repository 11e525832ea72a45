# What every guest does first; sourced by its init.
#
# The kernel command line says what a guest is to be.  A word gv.NAME=VALUE becomes the shell variable gv_NAME:
#   gv.vm=n1  gv.index=1  gv.address=10.9.0.1  gv.prefix=24 (the default)  gv.peers=10.9.0.1,10.9.0.2 (all VMs, in order of index)
# What a guest has to say to the world outside it says on its serial console, in lines that begin with GV-.

fail() {
    echo "GV-FAILED $1: $2"
    rest
}

# A first process must never end: the kernel would panic.
rest() {
    while :; do sleep 1000; done
}

# stty: no carriage return before each line feed.  dmesg: no message of the kernel's between ours.
mount_all() {
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev 2>/dev/null
    mkdir -p /dev/shm /dev/pts
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /tmp
    stty -F /dev/console -opost
    dmesg -n 1
}

read_command_line() {
    for word in $(cat /proc/cmdline); do
        case $word in
        gv.*=*)
            word=${word#gv.}
            eval "gv_${word%%=*}=\${word#*=}"
            ;;
        esac
    done
}

# The file names the modules in the order in which they must be loaded.
load_modules() {
    while read -r module; do
        insmod "/lib/modules/$module.ko" || fail 1 "cannot load the kernel module $module"
    done </lib/modules/order
}

set_address() {
    [ -n "$gv_address" ] || fail 1 "the kernel command line has no gv.address=; expected an IPv4 address"
    [ -e /sys/class/net/eth0 ] || fail 1 "there is no network interface; expected a virtio-net-pci device"
    hostname "${gv_vm:-guest}"
    ip link set lo up
    ip addr add "$gv_address/${gv_prefix:-24}" dev eth0 || fail 1 "cannot set the address $gv_address"
    ip link set eth0 up
}

boot() {
    mount_all
    read_command_line
    load_modules
    set_address
}
