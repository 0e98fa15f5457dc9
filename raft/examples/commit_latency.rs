//! Prints what a commit costs on this machine: three nodes in one process over loopback and mutual
//! TLS, each with its own directory and `fdatasync`.
//!
//! `cargo run --release -p raft --example commit_latency [COUNT]`

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use support::{Cluster, PATIENCE, put};

/// Requests that run at once in the concurrent series.
const CONCURRENCY: u64 = 64;

#[tokio::main]
async fn main() {
    let count: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2_000);
    let cluster = Cluster::start().await;
    let leader = cluster.node(cluster.leader().await);
    let follower = cluster.node(cluster.follower().await);

    let mut number = 0;
    for (name, node) in
        [("warm-up", &leader), ("on the leader", &leader), ("on a follower", &follower)]
    {
        let mut times = Vec::new();
        for _ in 0..count {
            number += 1;
            let started = Instant::now();
            put(node, number, "x").await;
            times.push(started.elapsed());
        }
        print(&format!("commit, {name}"), times);
    }

    let mut delays = Vec::new();
    for _ in 0..count {
        number += 1;
        let mut applied = follower.applied();
        let index = put(&leader, number, "x").await;
        let answered = Instant::now();
        let _ = tokio::time::timeout(PATIENCE, applied.wait_for(|applied| *applied >= index)).await;
        delays.push(answered.elapsed());
    }
    print("answer on the leader to applied on a follower", delays);

    for (name, node) in [("the leader", &leader), ("a follower", &follower)] {
        let mut times = Vec::new();
        for _ in 0..count {
            let started = Instant::now();
            node.read().await.expect("read");
            times.push(started.elapsed());
        }
        print(&format!("linearizable read on {name}"), times);
    }

    let started = Instant::now();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..CONCURRENCY {
        let leader = leader.clone();
        let each = count / 16;
        writers.spawn(async move {
            for step in 0..each {
                put(&leader, 1_000_000 * (writer + 1) + step, "x").await;
            }
        });
    }
    while writers.join_next().await.is_some() {}
    let committed = CONCURRENCY * (count / 16);
    let seconds = started.elapsed().as_secs_f64();
    println!("{CONCURRENCY} writers: {:.0} commits/s", committed as f64 / seconds);
    println!("fdatasync p50: {:?} us", leader.status().fsync_us_p50);
    cluster.stop_all().await;
}

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_micros();
    println!("{name}: p50 {} us, p90 {} us, p99 {} us", at(50), at(90), at(99));
}
