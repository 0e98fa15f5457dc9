//! How many 64-byte frames a second one switch moves between two guests of one host, and what an idle
//! switch costs. `cargo run --release -p netstack --example forwarding_rate`

use abi::packet_ring::{Direction, FRAME_BYTES_MAX, Region};
use netstack::program::{
    Direction as RuleDirection, Ethertype, FixedIp, Network, Port, Program, SecurityRule, Subnet,
};
use netstack::{Client, Switch, SwitchConfig};
use std::time::{Duration, Instant};

const FRAMES: u32 = 2_000_000;
/// Flows the frames are spread over.
const FLOWS: u32 = 1000;

fn main() {
    let directory = tempfile::tempdir().expect("a directory for the control socket");
    let control = directory.path().join("switch.sock");
    let config =
        SwitchConfig { control: control.clone(), vtep: "127.0.0.1:0".parse().expect("valid") };
    let switch = Switch::bind(&config).expect("a switch");
    let builder = std::thread::Builder::new().name("switch".to_owned());
    builder.spawn(move || switch.run()).expect("a thread");
    let mut client = Client::connect(&control).expect("a control connection");
    client.program(&program()).expect("a program in force");
    let regions = [Region::create().expect("a ring"), Region::create().expect("a ring")];
    for (n, region) in regions.iter().enumerate() {
        client.attach(&format!("port-{n}"), 1, region).expect("an attached port");
    }

    let before = switches();
    std::thread::sleep(Duration::from_secs(3));
    println!("idle: {} context switches in 3 s", switches() - before);

    let mut sender = regions[0].producer(Direction::FromGuest).expect("a producer");
    let mut receiver = regions[1].consumer(Direction::ToGuest).expect("a consumer");
    let cpu_before = switch_cpu();
    let started = Instant::now();
    let reader = std::thread::spawn(move || {
        let mut frame = [0; FRAME_BYTES_MAX];
        let mut got = 0;
        let mut last = Instant::now();
        while last.elapsed() < Duration::from_millis(300) {
            while receiver.pop(&mut frame).expect("an honest switch").is_some() {
                got += 1;
                last = Instant::now();
            }
            std::thread::yield_now();
        }
        (got, last)
    });
    for n in 0..FRAMES {
        let frame = frame(n % FLOWS);
        while !sender.push(&frame).expect("an honest switch") {
            sender.publish().expect("a wake-up");
            std::thread::yield_now();
        }
        if n % 32 == 31 {
            sender.publish().expect("a wake-up");
        }
    }
    sender.publish().expect("a wake-up");
    let (got, last) = reader.join().expect("a reader");
    let seconds = (last - started).as_secs_f64();
    println!(
        "sent {FRAMES}, received {got} in {seconds:.2} s: {:.0} frames/s",
        f64::from(got) / seconds
    );
    let cpu_ns = (switch_cpu() - cpu_before).as_nanos() / u128::from(FRAMES);
    println!("the switch's thread used {cpu_ns} ns of CPU for each frame it took");
    println!("{:?}", client.counters().expect("counters").ports);
}

/// CPU time of the thread that moves frames.
fn switch_cpu() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    let of_switch = |task: std::path::PathBuf| {
        let name = std::fs::read_to_string(task.join("comm")).ok()?;
        let used = std::fs::read_to_string(task.join("schedstat")).ok()?;
        (name.trim() == "switch").then(|| used.split_whitespace().next()?.parse::<u64>().ok())?
    };
    let nanoseconds = tasks.filter_map(|task| of_switch(task.ok()?.path())).sum();
    Duration::from_nanos(nanoseconds)
}

/// Voluntary context switches of all of this process's threads.
fn switches() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    let count = |status: String| {
        let line = status.lines().find(|line| line.starts_with("voluntary"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .filter_map(count)
        .sum()
}

fn frame(flow: u32) -> [u8; 64] {
    let mut frame = [0; 64];
    frame[..6].copy_from_slice(&[0xfa, 0x16, 0x3e, 0, 0, 1]);
    frame[6..12].copy_from_slice(&[0xfa, 0x16, 0x3e, 0, 0, 0]);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17]);
    frame[26..34].copy_from_slice(&[10, 0, 0, 10, 10, 0, 0, 11]);
    frame[34..36].copy_from_slice(&(flow as u16).to_be_bytes());
    frame[36..40].copy_from_slice(&[0, 9, 0, 30]);
    frame
}

fn program() -> Program {
    let rule = |direction| SecurityRule {
        direction,
        ethertype: Ethertype::Ipv4,
        protocol: None,
        port_min: None,
        port_max: None,
        remote_cidr: None,
    };
    let port = |n: u8| Port {
        id: format!("port-{n}"),
        network_id: "net".to_owned(),
        mac: format!("fa:16:3e:00:00:{n:02x}"),
        fixed_ips: vec![FixedIp {
            subnet_id: "subnet".to_owned(),
            address: std::net::Ipv4Addr::new(10, 0, 0, 10 + n).into(),
        }],
        port_security: true,
        security_rules: vec![rule(RuleDirection::Egress), rule(RuleDirection::Ingress)],
        ..Port::default()
    };
    let subnet =
        Subnet { id: "subnet".to_owned(), cidr: "10.0.0.0/24".to_owned(), ..Subnet::default() };
    let network = Network {
        id: "net".to_owned(),
        vni: 1,
        mtu: 1450,
        subnets: vec![subnet],
        remotes: Vec::new(),
    };
    Program {
        revision: 1,
        networks: vec![network],
        ports: vec![port(0), port(1)],
        forwards: vec![],
    }
}
