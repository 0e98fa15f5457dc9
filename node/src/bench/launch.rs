//! `trine bench launch`: the floor, the VMM alone, and the whole way through the API, in turn.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use abi::packet_ring::Region;
use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use vmm::config::{Boot, DiskConfig, DiskSource, NetBackend, NetConfig, Resource, VmConfig};
use vmm::control::ExitRecord;

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
    the API. fdatasync: 512 bytes appended on the nodes' file system. Teardown is not in the times.";

/// How much is measured.
pub struct LaunchOptions {
    /// Launches of each series.
    pub count: usize,
    /// Launches under way at once.
    pub concurrency: usize,
}

/// Where the series through the API are measured.
pub struct Cloud {
    /// Signed in as someone who may create servers.
    pub client: Client,
    /// The built-in guest image.
    pub image: String,
    /// A flavor that it fits.
    pub flavor: String,
    /// A network with a subnet.
    pub network: String,
    /// The nodes' directory.
    pub directory: PathBuf,
}

/// Measures in a cloud of three nodes of its own.
pub async fn in_own_cloud(options: &LaunchOptions) -> Result<Figures> {
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
pub async fn launch(options: &LaunchOptions, cloud: &Cloud) -> Result<Figures> {
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
    Ok(samples.figures(options))
}

/// Milliseconds of one round, by series.
type Round = Vec<(&'static str, f64)>;

async fn round(bench: &Arc<Bench>, cloud: &Cloud, number: usize) -> Result<Round> {
    let local = Arc::clone(bench);
    let mut round = tokio::task::spawn_blocking(move || local.round()).await??;
    round.push(("api/commit", commit(&cloud.client, number).await?));
    let (active, first_line) = boot(cloud, number).await?;
    round.extend([("api/active", active), ("api/first-line", first_line)]);
    Ok(round)
}

/// What the series without the API need.
struct Bench {
    spawner: vmm::spawner::Client,
    floor: File,
    directory: tempfile::TempDir,
    kernel: PathBuf,
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
            directory,
            kernel,
        })
    }

    fn round(&self) -> Result<Round> {
        let floor = self.spawner.run_floor(self.floor.as_fd(), MEMORY_MIB)?;
        Ok(vec![
            ("fdatasync", self.fdatasync()?),
            ("floor", milliseconds(floor.spawn_ns, floor.first_exit_ns)?),
            ("cold/no-devices", self.cold(false)?),
            ("cold/devices", self.cold(true)?),
        ])
    }

    fn fdatasync(&self) -> Result<f64> {
        let path = self.directory.path().join("fdatasync");
        let mut file = File::options().create(true).append(true).open(path)?;
        let start = Instant::now();
        file.write_all(&[0; 512])?;
        file.sync_data()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// One guest of the built-in image that ends at its main.
    fn cold(&self, devices: bool) -> Result<f64> {
        let mut descriptors: Vec<OwnedFd> = vec![File::open(&self.kernel)?.into()];
        let mut exit = tempfile::tempfile_in(self.directory.path())?;
        descriptors.push(exit.try_clone()?.into());
        let mut config = VmConfig {
            version: 1,
            id: "bench".into(),
            nonce: String::new(),
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            boot: Boot { kernel: Resource::Descriptor(0), cmdline: "exit-after-main".into() },
            console: None,
            disks: Vec::new(),
            nets: Vec::new(),
            control: None,
            exit_record: Some(Resource::Descriptor(1)),
            sandbox: Default::default(),
        };
        let ring =
            if devices { Some(self.add_devices(&mut config, &mut descriptors)?) } else { None };
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let guest = self.spawner.spawn(&config, &borrowed)?;
        wait_for_end(&guest.pidfd)?;
        drop(ring);
        let mut record = String::new();
        exit.rewind()?;
        exit.read_to_string(&mut record)?;
        let record: ExitRecord = serde_json::from_str(&record).context("the exit record")?;
        ensure!(
            record.code == Some(0),
            "the guest ended with {}: {}",
            record.reason,
            record.message
        );
        milliseconds(record.timings.spawn_ns, record.timings.main_ns)
    }

    fn add_devices(&self, config: &mut VmConfig, descriptors: &mut Vec<OwnedFd>) -> Result<Region> {
        let disk = tempfile::tempfile_in(self.directory.path())?;
        disk.set_len(1 << 20)?;
        config.disks.push(DiskConfig {
            id: "root".into(),
            source: DiskSource::Raw(Resource::Descriptor(descriptors.len())),
            read_only: false,
            serial: "root".into(),
        });
        descriptors.push(disk.into());
        let ring = Region::create()?;
        let first = descriptors.len();
        descriptors.extend(ring.descriptors()?);
        config.nets.push(NetConfig {
            id: "net".into(),
            mac: "fa:16:3e:00:00:01".into(),
            mtu: 1450,
            backend: NetBackend::Ring([first, first + 1, first + 2]),
        });
        Ok(ring)
    }
}

fn milliseconds(from_ns: u64, to_ns: u64) -> Result<f64> {
    ensure!(from_ns != 0 && to_ns > from_ns, "a launch without its times: {from_ns} to {to_ns}");
    Ok((to_ns - from_ns) as f64 / 1e6)
}

fn wait_for_end(pidfd: &OwnedFd) -> Result<()> {
    let timeout = Timespec { tv_sec: LAUNCH_WITHIN.as_secs() as i64, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout))?;
    ensure!(ended > 0, "the guest has not ended after {} s", LAUNCH_WITHIN.as_secs());
    Ok(())
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
    failures: usize,
}

impl Samples {
    fn add(&mut self, round: &Round) {
        for (name, value) in round {
            if let Some(index) = SERIES.iter().position(|series| series == name) {
                self.by_series[index].push(*value);
            }
        }
    }

    fn fail(&mut self, error: &anyhow::Error) {
        eprintln!("a round failed: {error:#}");
        self.failures += 1;
    }

    fn figures(self, options: &LaunchOptions) -> Figures {
        let series = SERIES.iter().zip(self.by_series);
        let mut figures = Figures {
            bench: "launch".into(),
            method: format!("{METHOD} Concurrency {}.", options.concurrency),
            series: series.filter_map(|(name, s)| Series::new(name, "ms", s)).collect(),
            failures: self.failures,
        };
        figures.relate_to("floor");
        figures
    }
}
