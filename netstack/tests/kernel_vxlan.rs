//! The kernel's vxlan device as an independent peer: it and the switch understand each other's frames.
//!
//! The test starts itself again in user and network namespaces of its own, so it needs no privilege
//! and touches nothing of the host. Where the host permits no such namespaces or has no vxlan device,
//! there is nothing to test against, and it says so.

#[allow(dead_code)]
mod bench;

use bench::{Guest, TestSwitch, address, network, port, program, until};
use netstack::program::Remote;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress};
use std::process::Command;
use std::time::{Duration, Instant};

/// Process id of the namespace with the kernel's endpoint, where the test runs inside its own.
const PEER: &str = "TRINE_TEST_VXLAN_PEER";
const PEER_MAC: &str = "02:00:00:00:00:20";

/// Two network namespaces joined by a veth pair: the switch runs here, the kernel's vxlan device over
/// there. (On one loopback the kernel would never encapsulate.) `RUN` runs in the first.
const SCRIPT: &str = r#"
set -e
unshare --net sleep 120 &
export TRINE_TEST_VXLAN_PEER=$!
trap 'kill $TRINE_TEST_VXLAN_PEER' EXIT
while [ "$(readlink /proc/$TRINE_TEST_VXLAN_PEER/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do :; done
ip link add v0 type veth peer name v1
ip link set v1 netns $TRINE_TEST_VXLAN_PEER
ip addr add 198.18.0.1/24 dev v0
ip link set v0 up
nsenter --target $TRINE_TEST_VXLAN_PEER --net sh -ec '
    ip addr add 198.18.0.2/24 dev v1
    ip link set v1 up
    ip link add vx0 address 02:00:00:00:00:20 type vxlan id 77 local 198.18.0.2 dstport 4789 nolearning
    ip addr add 10.0.0.20/24 dev vx0
    ip link set vx0 mtu 1450 up'
"#;

#[test]
fn the_kernel_is_reached_through_vxlan() {
    if let Ok(peer) = std::env::var(PEER) {
        return ping_the_kernel(&peer);
    }
    let inside = |script: &str| {
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--net", "sh", "-c", script])
            .output()
    };
    match inside(SCRIPT) {
        Ok(output) if output.status.success() => {}
        other => return eprintln!("no namespaces with a vxlan device here: {other:?}"),
    }
    let program = std::env::current_exe().unwrap();
    let test = "--exact the_kernel_is_reached_through_vxlan --nocapture";
    let output = inside(&format!("{SCRIPT}\n{} {test}", program.display())).unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("the kernel answered"), "{text}");
}

fn ping_the_kernel(peer: &str) {
    let mut switch = TestSwitch::start("198.18.0.1");
    let flood = format!(
        "bridge fdb append 00:00:00:00:00:00 dev vx0 dst 198.18.0.1 port {}",
        switch.vtep.port()
    );
    let mut there = Command::new("nsenter");
    there.args(["--target", peer, "--net"]).args(flood.split(' '));
    assert!(there.status().unwrap().success());

    let mut guest = Guest::with_address(10);
    let mut tenant = network("net", 77);
    tenant.remotes = vec![Remote {
        mac: PEER_MAC.to_owned(),
        ips: vec![address(20).into()],
        vtep: "198.18.0.2:4789".parse().unwrap(),
    }];
    switch.client.program(&program(vec![tenant], vec![port("net", 10)])).unwrap();
    switch.client.attach("net-port-10", 1, &guest.region).unwrap();

    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(0x33)).unwrap();
    let handle = guest.sockets.add(socket);
    let mut sent: Option<Instant> = None;
    let answer = until(&mut [&mut guest], |guests| {
        let socket = guests[0].sockets.get_mut::<icmp::Socket>(handle);
        if sent.is_none_or(|at| at.elapsed() > Duration::from_millis(200)) && socket.can_send() {
            let request = Icmpv4Repr::EchoRequest { ident: 0x33, seq_no: 9, data: &[7; 1200] };
            let room = socket.send(request.buffer_len(), IpAddress::Ipv4(address(20))).unwrap();
            request.emit(&mut Icmpv4Packet::new_unchecked(room), &Default::default());
            sent = Some(Instant::now());
        }
        Some(socket.recv().ok()?.0.to_vec())
    });
    let answer = Icmpv4Packet::new_checked(&answer[..]).unwrap();
    let answer = Icmpv4Repr::parse(&answer, &Default::default()).unwrap();
    assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 0x33, seq_no: 9, data: &[7; 1200] });
    println!("the kernel answered");
}
