//! `trine bench launch`: the floor, the VMM alone, and the whole way through the API, in turn.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::json;
use vmm::bench::{Devices, Image, Sample, trace};

use super::{Figures, Series};
use crate::client::objects::{create_flavor, create_image, create_network, create_subnet};
use crate::client::{Client, Service, text};
use crate::cluster::{Addresses, Cluster, NODES};
use crate::embedded::{self, GUEST_IMAGE};

/// Memory of the floor's guest and of the VMM's, MiB.
const MEMORY_MIB: u32 = 128;
/// Longest a single launch may take.
const LAUNCH_WITHIN: Duration = Duration::from_secs(30);
const METHOD: &str = "Each round takes every series once, in turn. floor, cold/*: from before the \
    spawner's clone to the guest's first port write (floor) or its main (cold), 128 MiB, 1 vCPU, \
    sandbox on, page cache warm; cold/devices has one virtio-blk and one virtio-net. api/active: \
    POST /servers sent to the first GET that says ACTIVE (asked each ms); api/first-line: the same \
    POST to the first console line in the API's console log. api/commit: one small write through \
    the API. fdatasync: 512 bytes appended on the nodes' file system. Teardown is not in the times. \
    calls/*: system calls of the process from its fork to its first KVM_RUN, by ptrace, in launches \
    of their own. exits/*: exits to the VMM up to and with the guest's mark.";

/// How much is measured.
pub(crate) struct LaunchOptions {
    /// Launches of each series.
    pub(crate) count: usize,
    /// Launches under way at once.
    pub(crate) concurrency: usize,
}

/// Where the series through the API are measured.
pub(crate) struct Cloud {
    /// Signed in as someone who may create servers.
    pub(crate) client: Client,
    /// The built-in guest image.
    pub(crate) image: String,
    /// A flavor that it fits.
    pub(crate) flavor: String,
    /// A network with a subnet.
    pub(crate) network: String,
    /// The nodes' directory.
    pub(crate) directory: PathBuf,
}

/// Measures in a cloud of three nodes of its own.
pub(crate) async fn in_own_cloud(options: &LaunchOptions) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("trine-bench-").tempdir()?;
    let addresses = Addresses::of_process(std::process::id());
    let mut cluster = Cluster::at(directory.path(), addresses)?;
    let measured = tokio::select! {
        measured = measure_in(&mut cluster, addresses, options) => measured,
        signal = tokio::signal::ctrl_c() => { signal?; Err(anyhow!("interrupted")) }
    };
    cluster.end().await?;
    measured
}

async fn measure_in(
    cluster: &mut Cluster,
    addresses: Addresses,
    options: &LaunchOptions,
) -> Result<Figures> {
    eprintln!("making a cloud of three nodes");
    cluster.make_first(addresses).await?;
    for index in 1..NODES {
        cluster.join(index).await?;
    }
    let client = cluster.client().await?;
    let network = create_network(&client, "bench-net").await?;
    create_subnet(&client, &network).await?;
    let cloud = Cloud {
        image: create_image(&client).await?,
        flavor: create_flavor(&client, "bench.tiny").await?,
        network,
        directory: cluster.directory().to_path_buf(),
        client,
    };
    launch(options, &cloud).await
}

/// Measures all series.
pub(crate) async fn launch(options: &LaunchOptions, cloud: &Cloud) -> Result<Figures> {
    ensure!(options.count > 0, "--count is 0; at least one launch must be measured");
    ensure!((1..=64).contains(&options.concurrency), "--concurrency must be 1 to 64");
    let bench = Arc::new(Bench::prepare(&cloud.directory)?);
    // The first of each is slower: caches of the kernel and of the nodes are cold.
    round(&bench, cloud, usize::MAX).await.context("the round that warms up failed")?;

    let mut samples = Samples::default();
    let rounds: Vec<usize> = (0..options.count).collect();
    for batch in rounds.chunks(options.concurrency) {
        let batch = batch.iter().map(|number| round(&bench, cloud, *number));
        for result in futures::future::join_all(batch).await {
            match result {
                Ok(round) => samples.add(&round),
                Err(error) => samples.fail(&error),
            }
        }
    }
    let counted = tokio::task::spawn_blocking(move || bench.count()).await?;
    let mut figures = samples.figures(options);
    match counted {
        Ok(counted) => figures.series.extend(counted),
        Err(error) => eprintln!("calls and exits are not counted: {error:#}"),
    }
    Ok(figures)
}

/// One round: milliseconds by series, and CPU milliseconds where they are known.
type Round = Vec<(&'static str, f64, Option<f64>)>;

async fn round(bench: &Arc<Bench>, cloud: &Cloud, number: usize) -> Result<Round> {
    let local = Arc::clone(bench);
    let mut round = tokio::task::spawn_blocking(move || local.round()).await??;
    round.push(("api/commit", commit(&cloud.client, number).await?, None));
    let (active, first_line) = boot(cloud, number).await?;
    round.extend([("api/active", active, None), ("api/first-line", first_line, None)]);
    Ok(round)
}

/// What the series without the API need.
struct Bench {
    spawner: vmm::spawner::Client,
    floor: File,
    kernel: File,
    directory: tempfile::TempDir,
}

impl Bench {
    fn prepare(directory: &Path) -> Result<Bench> {
        let directory = tempfile::Builder::new().prefix("bench-").tempdir_in(directory)?;
        let executables = embedded::install(directory.path())?;
        let kernel = directory.path().join("guest.elf");
        std::fs::write(&kernel, GUEST_IMAGE)?;
        Ok(Bench {
            spawner: vmm::spawner::Client::start(&executables.vmm)?,
            floor: File::open(&executables.floor)?,
            kernel: File::open(kernel)?,
            directory,
        })
    }

    fn round(&self) -> Result<Round> {
        let floor = vmm::bench::floor(&self.spawner, &self.floor, MEMORY_MIB)?;
        let cold = |devices| vmm::bench::launch(&self.spawner, self.image(), devices);
        Ok(vec![
            ("fdatasync", self.fdatasync()?, None),
            sample("floor", floor),
            sample("cold/no-devices", cold(Devices::None)?),
            sample("cold/devices", cold(Devices::BlockAndNet)?),
        ])
    }

    fn image(&self) -> Image<'_> {
        let cmdline = "exit-after-main";
        Image { kernel: &self.kernel, cmdline, memory_mib: MEMORY_MIB }
    }

    /// What a launch costs whatever the machine: its system calls and exits.
    fn count(&self) -> Result<Vec<Series>> {
        let floor = || vmm::bench::floor(&self.spawner, &self.floor, MEMORY_MIB);
        let cold = |devices| vmm::bench::launch(&self.spawner, self.image(), devices);
        let mut series = Vec::new();
        for (name, (sample, calls)) in [
            ("floor", trace::count(&self.spawner, floor)?),
            ("cold/no-devices", trace::count(&self.spawner, || cold(Devices::None))?),
            ("cold/devices", trace::count(&self.spawner, || cold(Devices::BlockAndNet))?),
        ] {
            let calls = vec![calls.numbers.len() as f64];
            let exits = vec![f64::from(sample.exits)];
            series.extend(Series::new(&format!("calls/{name}"), "calls", calls));
            series.extend(Series::new(&format!("exits/{name}"), "exits", exits));
        }
        Ok(series)
    }

    fn fdatasync(&self) -> Result<f64> {
        let path = self.directory.path().join("fdatasync");
        let mut file = File::options().create(true).append(true).open(path)?;
        let start = Instant::now();
        file.write_all(&[0; 512])?;
        file.sync_data()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

fn sample(name: &'static str, sample: Sample) -> (&'static str, f64, Option<f64>) {
    (name, sample.launch_ns as f64 / 1e6, Some(sample.cpu_ns as f64 / 1e6))
}

/// A small write through the API: one commit and its request.
async fn commit(client: &Client, number: usize) -> Result<f64> {
    let name = format!("bench-{number}");
    let body = json!({"server_group": {"name": name, "policy": "affinity"}});
    let start = Instant::now();
    let made = client.post(Service::Compute, "os-server-groups", &body).await?;
    let took = start.elapsed();
    let id = text(&made, "/server_group/id")?;
    client.delete(Service::Compute, &format!("os-server-groups/{id}")).await?;
    Ok(took.as_secs_f64() * 1e3)
}

/// One server from POST to ACTIVE and to its first console line.
async fn boot(cloud: &Cloud, number: usize) -> Result<(f64, f64)> {
    let Cloud { client, image, flavor, network, .. } = cloud;
    let body = json!({"server": {
        "name": format!("bench-{number}"), "imageRef": image, "flavorRef": flavor,
        "networks": [{"uuid": network}],
    }});
    let start = Instant::now();
    let made = client.post(Service::Compute, "servers", &body).await?;
    let path = format!("servers/{}", text(&made, "/server/id")?);
    let measured = async {
        let active = until_active(client, &path, start).await?;
        let first_line = until_first_line(client, &path, start).await?;
        Ok((active, first_line))
    };
    let measured = measured.await;
    client.delete_and_wait(Service::Compute, &path).await?;
    measured
}

async fn until_active(client: &Client, path: &str, start: Instant) -> Result<f64> {
    loop {
        let answer = client.get(Service::Compute, path).await?;
        match answer["server"]["status"].as_str() {
            Some("ACTIVE") => return Ok(start.elapsed().as_secs_f64() * 1e3),
            Some("ERROR") => bail!("the server is in ERROR: {}", answer["server"]["fault"]),
            _ => pause(start).await?,
        }
    }
}

async fn until_first_line(client: &Client, path: &str, start: Instant) -> Result<f64> {
    loop {
        let body = json!({"os-getConsoleOutput": {}});
        let answer = client.post(Service::Compute, &format!("{path}/action"), &body).await?;
        if text(&answer, "/output")?.contains('\n') {
            return Ok(start.elapsed().as_secs_f64() * 1e3);
        }
        pause(start).await?;
    }
}

async fn pause(start: Instant) -> Result<()> {
    ensure!(start.elapsed() < LAUNCH_WITHIN, "no launch within {} s", LAUNCH_WITHIN.as_secs());
    tokio::time::sleep(Duration::from_millis(1)).await;
    Ok(())
}

const SERIES: [&str; 7] = [
    "fdatasync",
    "floor",
    "cold/no-devices",
    "cold/devices",
    "api/commit",
    "api/active",
    "api/first-line",
];

/// What was measured so far.
#[derive(Default)]
struct Samples {
    by_series: [Vec<f64>; SERIES.len()],
    cpu: [Vec<f64>; SERIES.len()],
    failures: usize,
}

impl Samples {
    fn add(&mut self, round: &Round) {
        for (name, ms, cpu_ms) in round {
            if let Some(index) = SERIES.iter().position(|series| series == name) {
                self.by_series[index].push(*ms);
                self.cpu[index].extend(cpu_ms);
            }
        }
    }

    fn fail(&mut self, error: &anyhow::Error) {
        eprintln!("a round failed: {error:#}");
        self.failures += 1;
    }

    fn figures(self, options: &LaunchOptions) -> Figures {
        let series = SERIES.iter().zip(self.by_series).zip(self.cpu);
        let mut figures = Figures {
            bench: "launch".into(),
            method: format!("{METHOD} Concurrency {}.", options.concurrency),
            series: series
                .filter_map(|((name, ms), cpu)| Some(Series::new(name, "ms", ms)?.with_cpu(cpu)))
                .collect(),
            failures: self.failures,
        };
        figures.relate_to("floor");
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_guest_reaches_its_main_within_the_budget() {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("SKIPPED: no /dev/kvm");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let counted = Bench::prepare(directory.path()).unwrap().count().unwrap();
        let figure = |name: &str| {
            counted.iter().find(|series| series.name == name).map_or(f64::NAN, |series| series.p50)
        };
        let floor = figure("calls/floor");
        for (name, more_max) in [("cold/no-devices", 20.0), ("cold/devices", 28.0)] {
            let more = figure(&format!("calls/{name}")) - floor;
            assert!(more <= more_max, "{name}: {more} calls more than the floor's {floor}");
            assert_eq!(figure(&format!("exits/{name}")), 1.0, "{name}: only the mark itself");
        }
    }
}
