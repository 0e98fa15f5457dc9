//! `trine demo`: the main job, shown. It makes a cluster of three nodes as a user of three hosts
//! would, does through the HTTPS API what a client would, and deletes all it made.

mod guests;
mod report;
mod scenario;
mod steps;

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cluster::{Addresses, Cluster};
use report::Report;
use scenario::Scenario;

/// What `trine demo` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trine demo\n  trine demo --keep\n  trine demo --json | tail -n 1"
)]
pub(crate) struct Args {
    /// Leaves the cloud running at the end and prints how to use it.
    #[arg(long)]
    keep: bool,
    /// Ends with the result as one line of JSON.
    #[arg(long)]
    json: bool,
    /// Launches of each series of the closing benchmark; 0 leaves it out.
    #[arg(long, default_value_t = 20)]
    launches: usize,
    /// Where the three nodes keep their data (default: a temporary directory).
    #[arg(long)]
    directory: Option<PathBuf>,
}

/// Runs the demo to its end; a failed step is the error.
pub(crate) fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let mut report = Report::new(args.json);
        let result = demo(&args, &mut report).await;
        report.finish(result.as_ref().err());
        result
    })
}

async fn demo(args: &Args, report: &mut Report) -> Result<()> {
    let temporary = match &args.directory {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("trine-demo-").tempdir()?),
    };
    let directory = args.directory.clone().or(temporary.as_ref().map(|t| t.path().to_path_buf()));
    let directory = directory.context("one of the two is there")?;
    let addresses = Addresses::of_process(std::process::id());
    let mut cluster = Cluster::at(&directory, addresses)?;

    let done = tokio::select! {
        done = perform(args, report, &mut cluster, addresses) => done,
        signal = tokio::signal::ctrl_c() => {
            signal?;
            Err(anyhow::anyhow!("interrupted"))
        }
    };
    if args.keep && done.is_ok() {
        if let Some(temporary) = temporary {
            let _ = temporary.keep();
        }
        report.text(&how_to_use(&cluster));
        return done;
    }
    if let (Err(_), true) = (&done, std::env::var_os("TRINE_DEMO_KEEP_FAILED").is_some()) {
        report.text(&format!("left as it is, in {}", cluster.directory().display()));
        if let Some(temporary) = temporary {
            let _ = temporary.keep();
        }
        return done;
    }
    let ended = report.step("end the cluster", async {
        cluster.end().await?;
        for member in cluster.members() {
            member.remove()?;
        }
        Ok(String::from("nodes, switches, storage ended; data removed"))
    });
    done.and(ended.await.map(drop))
}

async fn perform(
    args: &Args,
    report: &mut Report,
    cluster: &mut Cluster,
    addresses: Addresses,
) -> Result<()> {
    scenario::make_cluster(report, cluster, addresses).await?;
    let mut scenario = Scenario::new(cluster, report).await?;
    scenario.fill_catalog().await?;
    scenario.boot_guests().await?;
    scenario.check_guests().await?;
    scenario.forward_port().await?;
    scenario.move_volume().await?;
    scenario.lose_leader().await?;
    if args.launches > 0 {
        scenario.measure(args.launches).await?;
    }
    if !args.keep {
        scenario.delete_all().await?;
    }
    Ok(())
}

fn how_to_use(cluster: &Cluster) -> String {
    let first = &cluster.members()[0];
    let directory = first.data_directory.display();
    format!(
        "The cloud is left running.\n\
         \x20 export OS_CLIENT_CONFIG_FILE={directory}/clouds.yaml OS_CLOUD=trine\n\
         \x20 openstack server list\n\
         or  . {directory}/admin-openrc\n\
         To stop one node and all it runs: trine stop --guests --data-dir DIR, for each of\n\
         \x20 {}",
        cluster
            .members()
            .iter()
            .map(|member| member.data_directory.display().to_string())
            .collect::<Vec<_>>()
            .join(" ")
    )
}
