//! A process that writes a real log on a real disk is killed with -9 again and again, and nothing it
//! had acknowledged is missing.

mod support;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use raft::{Config, Member, Raft, Unprepared};
use support::{Authority, CLUSTER, Echo, Store, id};

const CHILD: &str = "TRINE_TEST_KILLED_CHILD";
const ROUNDS: u64 = 12;
const TEST: &str = "a_killed_process_has_lost_nothing_that_it_acknowledged";

fn config(directory: &Path) -> Config {
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).expect("read");
    Config {
        cluster_id: CLUSTER,
        node_id: 1,
        directory: directory.join("raft"),
        tls: raft::Tls { ca: read("ca"), cert: read("cert"), key: read("key") },
        heartbeat_ms: 20,
        election_ms_min: 40,
        election_ms_max: 80,
        // Snapshots, purges and new segments happen all the time.
        snapshot_every: 40,
        keep_entries: 10,
        ..Config::default()
    }
}

async fn start(directory: &Path) -> Raft<Store> {
    let node =
        Raft::start(config(directory), Store::default(), Arc::new(Unprepared), Arc::new(Echo(1)))
            .await
            .expect("start");
    let me = Member { address: node.listen_address(), name: "one".to_owned() };
    node.bootstrap(me).await.expect("bootstrap");
    node
}

/// The child: writes as fast as it can and says what was acknowledged, until it is killed.
async fn write_for_ever(directory: &Path) {
    let node = start(directory).await;
    let first = node.read().await.expect("read").applied + 1;
    let filler = "f".repeat(20_000);
    for number in first.. {
        let command = format!("key-{number}={filler}").into_bytes();
        node.propose(id(number), command).await.expect("proposed");
        let mut out = std::io::stdout().lock();
        writeln!(out, "acknowledged {number}").and_then(|()| out.flush()).expect("said");
    }
}

/// Runs the child until it has acknowledged some more, kills it, and returns the last it said.
fn run_and_kill(directory: &Path, more: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", TEST, "--nocapture"])
        .env(CHILD, directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("spawn");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let number = |line: &str| -> Option<u64> { line.split("acknowledged ").nth(1)?.parse().ok() };
    let mut last = 0;
    for _ in 0..more {
        let line = lines.find_map(|line| number(&line.expect("a line")));
        last = line.expect("the child goes on");
    }
    child.kill().expect("kill");
    child.wait().expect("gone");
    // What it said before it died counts as well; its last line may be cut.
    let rest = lines.map_while(Result::ok).filter_map(|line| number(&line));
    rest.fold(last, u64::max)
}

#[test]
fn a_killed_process_has_lost_nothing_that_it_acknowledged() {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    if let Some(directory) = std::env::var_os(CHILD) {
        return runtime.block_on(write_for_ever(Path::new(&directory)));
    }
    let directory = tempfile::tempdir().expect("temporary directory");
    let tls = Authority::new().node(&CLUSTER, 1);
    for (name, text) in [("ca", &tls.ca), ("cert", &tls.cert), ("key", &tls.key)] {
        std::fs::write(directory.path().join(name), text).expect("write");
    }
    let mut acknowledged = 0;
    for round in 0..ROUNDS {
        let last = run_and_kill(directory.path(), 1 + round * 13 % 60);
        assert!(last > acknowledged, "round {round}");
        acknowledged = last;
    }
    let seen: BTreeSet<u64> = runtime.block_on(async {
        let node = start(directory.path()).await;
        let view = node.read().await.expect("read");
        node.shutdown().await;
        let numbers = view.values.keys().filter_map(|key| key.strip_prefix("key-")?.parse().ok());
        numbers.collect()
    });
    let missing: Vec<u64> = (1..=acknowledged).filter(|number| !seen.contains(number)).collect();
    assert!(missing.is_empty(), "{missing:?} were acknowledged and are gone");
    assert!(seen.len() as u64 <= acknowledged + 1, "at most one more was on its way");
}
