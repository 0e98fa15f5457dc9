//! `trine bench failover`: how long no write is accepted after the leader was killed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;

use super::{Figures, Series};
use crate::client::{Client, Service, text};
use crate::cluster::{Addresses, Cluster, NODES};

/// How long the cluster may take to be whole again before the next kill.
const WHOLE_WITHIN: Duration = Duration::from_secs(60);
/// How long writes may be refused after a kill before the measurement counts as failed.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(30);

const METHOD: &str = "Three nodes on this machine, each a process of its own. In each round the \
    node that leads is killed (SIGKILL); from then on one writer asks a node that is left (in \
    turn) for a small write through the API, again at once where it is refused. accepted: from \
    before the kill to the first answer that acknowledges a write which was asked after it. Then the \
    killed node is started and the next round begins once it has caught up as a voter.";

/// Measures in a cloud of its own.
pub(crate) async fn failover(kills: usize) -> Result<Figures> {
    ensure!(kills > 0, "--kills is 0; at least one must be measured");
    let directory = tempfile::Builder::new().prefix("trine-bench-").tempdir()?;
    let addresses = Addresses::of_process(std::process::id());
    let mut cluster = Cluster::at(directory.path(), addresses)?;
    let measured = tokio::select! {
        measured = measure(&mut cluster, addresses, kills) => measured,
        signal = tokio::signal::ctrl_c() => { signal?; Err(anyhow!("interrupted")) }
    };
    cluster.end().await?;
    measured
}

async fn measure(cluster: &mut Cluster, addresses: Addresses, kills: usize) -> Result<Figures> {
    eprintln!("making a cloud of three nodes");
    cluster.make_first(addresses).await?;
    for index in 1..NODES {
        cluster.join(index).await?;
    }
    let client = cluster.client().await?;
    let (mut accepted_ms, mut ready_ms, mut failures) = (Vec::new(), Vec::new(), 0);
    for number in 0..kills {
        match round(cluster, &client, number).await {
            Ok((accepted, ready)) => {
                eprintln!("kill {} of {kills}: {accepted:.0} ms", number + 1);
                accepted_ms.push(accepted);
                ready_ms.push(ready);
            }
            Err(error) => {
                eprintln!("kill {} of {kills} failed: {error:#}", number + 1);
                failures += 1;
                repair(cluster).await?;
            }
        }
    }
    let series = [
        Series::new("accepted", "ms", accepted_ms),
        Series::new("killed-node-ready", "ms", ready_ms),
    ];
    Ok(Figures {
        bench: "failover".into(),
        method: format!("{METHOD} {kills} kills."),
        series: series.into_iter().flatten().collect(),
        failures,
    })
}

/// One kill: until a write is accepted, and until the killed node serves again; milliseconds.
async fn round(cluster: &mut Cluster, client: &Client, number: usize) -> Result<(f64, f64)> {
    whole(cluster).await?;
    let leader = cluster.leader().await?;
    let survivors = (1..NODES).map(|step| (leader + step) % NODES);
    let survivor = survivors.collect::<Vec<_>>()[number % (NODES - 1)];
    let client = client.at(&cluster.members()[survivor].api_address());
    // A connection is open before: what is measured is the cluster.
    write(&client, &format!("before-{number}")).await?;

    let start = Instant::now();
    cluster.member_mut(leader).kill().await?;
    let accepted = loop {
        match write(&client, &format!("after-{number}")).await {
            Ok(()) => break start.elapsed(),
            Err(error) if start.elapsed() > ACCEPTED_WITHIN => {
                return Err(error.context("no write was accepted"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    let start = Instant::now();
    cluster.member_mut(leader).start().await?;
    Ok((accepted.as_secs_f64() * 1e3, start.elapsed().as_secs_f64() * 1e3))
}

/// A small write: one commit and its request. A cleanup follows outside the measured time.
async fn write(client: &Client, name: &str) -> Result<()> {
    let body = json!({"server_group": {"name": name, "policy": "affinity"}});
    let made = client.post(Service::Compute, "os-server-groups", &body).await?;
    text(&made, "/server_group/id").map(drop)
}

/// Waits until every node is a voter that has what the leader has.
async fn whole(cluster: &Cluster) -> Result<()> {
    let start = Instant::now();
    loop {
        let leader = cluster.leader().await?;
        let status = cluster.members()[leader].status().await?;
        let last = status["consensus"]["last_log"].as_u64().context("last_log")?;
        let members = status["members"].as_array().context("members")?;
        let caught_up = |member: &serde_json::Value| {
            let has_all = member["matched"].as_u64().is_some_and(|at| at >= last);
            member["voter"] == true && (has_all || member["id"] == status["leader"])
        };
        if members.len() == NODES && members.iter().all(caught_up) {
            return Ok(());
        }
        ensure!(start.elapsed() < WHOLE_WITHIN, "the cluster does not become whole: {status}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn repair(cluster: &mut Cluster) -> Result<()> {
    for index in 0..NODES {
        if !cluster.members()[index].is_running() {
            cluster.member_mut(index).start().await?;
        }
    }
    Ok(())
}
