//! The start of a guest: networking ∥ block_device_mapping, then spawning, then the report.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use abi::packet_ring::Region;
use anyhow::{Context as _, Result};
use controller::api::SubState;
use controller::plan::Step;
use controller::plan::view::{HostView, ImageSource, Nic, ServerView};
use controller::state::compute::ComputeCommand;
use storage::ErrorKind;
use storage::control::Peer;
use tracing::{info, warn};
use vmm::config::{
    Boot, Console, DiskConfig, DiskSource, NetBackend, NetConfig, Resource, Sandbox, VmConfig,
};

use super::directory::{GuestDirectory, Record};
use super::execute::compute;
use super::world::{Guest, Observation};
use super::{Agent, GIVE_UP_AFTER};
use crate::process::Held;

/// Failed tries after which the server goes to ERROR.
const START_TRIES: u32 = 3;

/// The spawner's answer to a guest that it can't make.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

/// What a guest is made from.
struct Disks {
    kernel: OwnedFd,
    root: OwnedFd,
    config_drive: Option<OwnedFd>,
}

impl Agent {
    pub(super) async fn start_guest(
        &self,
        step: &Step,
        view: &ServerView,
        host: &HostView,
    ) -> Result<()> {
        let id = &view.server.id;
        let started = self.launch(view, host).await;
        let reported = match started {
            Ok(()) => self.report_started(view).await,
            Err(error) if self.gives_up(step, &error) => {
                warn!(server_id = %id, error = %format!("{error:#}"), "agent: a guest does not start");
                self.report_failed(view, &error).await
            }
            Err(error) => Err(error),
        };
        self.with_world(|world| world.starting.remove(id));
        reported
    }

    /// Whether a start that failed again has failed for good: what another try may heal (a storage
    /// process that is being restarted, a host that holds the image and is away) is tried longer.
    fn gives_up(&self, step: &Step, error: &anyhow::Error) -> bool {
        let lasting = error.chain().find_map(|cause| cause.downcast_ref::<storage::Error>());
        let lasting = lasting.is_some_and(|error| {
            matches!(error.kind, ErrorKind::NoSpace | ErrorKind::Invalid | ErrorKind::NotFound)
        });
        let lasting = lasting || error.chain().any(|cause| cause.is::<Refused>());
        let tried = self.failures(step) + 1 >= START_TRIES;
        tried && (lasting || self.failing_for(step) >= GIVE_UP_AFTER)
    }

    async fn report_failed(&self, view: &ServerView, error: &anyhow::Error) -> Result<()> {
        self.report(compute(ComputeCommand::ServerFailed {
            id: view.server.id.clone(),
            generation: view.generation,
            code: 500,
            message: format!("Build of instance {} aborted: {error:#}", view.server.id),
            details: error.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
        }))
        .await
    }

    async fn launch(&self, view: &ServerView, host: &HostView) -> Result<()> {
        let id = &view.server.id;
        let begin = |stage| {
            self.with_world(|world| world.starting.insert(id.clone(), stage));
            Instant::now()
        };
        let networking = async {
            let start = begin(SubState::Networking);
            self.program_switch().await.context("networking")?;
            anyhow::Ok(start.elapsed())
        };
        let mapping = async {
            let start = begin(SubState::BlockDeviceMapping);
            let documents = self.instance_documents(view, host)?;
            let view = view.clone();
            let disks = self.blocking(move |agent| agent.make_disks(&view, &documents)).await;
            anyhow::Ok((disks.context("block_device_mapping")?, start.elapsed()))
        };
        let (networking, (disks, mapping)) = tokio::try_join!(networking, mapping)?;
        let start = begin(SubState::Spawning);
        let owned = view.clone();
        let pidfd =
            self.blocking(move |agent| agent.spawn(&owned, disks)).await.context("spawning")?;
        let stages = [
            (SubState::Networking, networking),
            (SubState::BlockDeviceMapping, mapping),
            (SubState::Spawning, start.elapsed()),
        ];
        self.with_world(|world| world.started(id, &stages));
        self.watch(id.clone(), pidfd);
        Ok(())
    }

    /// Instance data of a server as the config drive and the metadata service show it. A guest
    /// must not start without its user data: a node that lacks the key to it may get it soon.
    pub(super) fn instance_documents(
        &self,
        view: &ServerView,
        host: &HostView,
    ) -> Result<BTreeMap<String, Vec<u8>>> {
        let opened =
            view.server.user_data.as_ref().map(|sealed| self.context().sealer.open(sealed));
        let user_data = opened.transpose().context("cannot open the user data")?;
        Ok(controller::instance_data::documents(view, &host.switch, user_data.as_deref()))
    }

    fn make_disks(
        &self,
        view: &ServerView,
        documents: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Disks> {
        let id = view.server.id.as_str();
        let mut storage = self.storage()?;
        if let Some(image) = &view.image {
            self.hold_image(&mut storage, image)?;
            // Even if it fails: what is left of it has to go.
            self.with_world(|world| world.root_is(&view.server.id, true));
            let root_bytes = (view.server.flavor.root_gib << 30).max(image.size_bytes);
            storage.create_root(id, &image.sha512, root_bytes.next_multiple_of(512))?;
        }
        let root = storage.open_root(id).context("its root disk")?.descriptor;
        // An image that left the catalog is still what the root disk begins with.
        let kernel = match &view.image {
            Some(image) => storage.read_image(&image.sha512)?.descriptor,
            None => root.try_clone()?,
        };
        let config_drive = match view.server.config_drive {
            true => Some(storage.write_config_drive(id, documents)?.descriptor),
            false => None,
        };
        Ok(Disks { kernel, root, config_drive })
    }

    fn hold_image(&self, storage: &mut storage::Client, image: &ImageSource) -> Result<()> {
        if storage.has_image(&image.sha512)? {
            return Ok(());
        }
        let peers = image.sources.iter();
        let peers: Vec<Peer> = peers
            .map(|peer| Peer { address: peer.address, server_name: peer.server_name.clone() })
            .collect();
        anyhow::ensure!(!peers.is_empty(), "no other host holds the image {}", image.sha512);
        info!(sha512 = image.sha512, size_bytes = image.size_bytes, "agent: fetching an image");
        Ok(storage.fetch_image(&image.sha512, image.size_bytes, peers)?)
    }

    fn spawn(&self, view: &ServerView, disks: Disks) -> Result<OwnedFd> {
        let id = view.server.id.clone();
        let directory = GuestDirectory::of(&self.context().guests, id.as_str());
        let record = Record {
            server_id: id.to_string(),
            generation: view.generation,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            boot_id: crate::process::boot_id(),
            ports: view.ports.iter().map(|nic| nic.port.to_string()).collect(),
            stopped: false,
        };
        let prepared = directory.prepare(&record).context("cannot prepare its directory")?;
        let rings = self.make_rings(view)?;
        let mut resources = Descriptors::default();
        let config = VmConfig {
            version: 1,
            id: id.to_string(),
            nonce: record.nonce.clone(),
            vcpus: u8::try_from(view.server.flavor.vcpus).context("too many vCPUs")?,
            memory_mib: u32::try_from(view.server.flavor.ram_mib).context("too much memory")?,
            huge_pages: Default::default(),
            boot: Boot {
                kernel: resources.add(disks.kernel),
                initrd: None,
                cmdline: String::new(),
            },
            console: Some(Console {
                file: resources.add(prepared.console.into()),
                capacity_bytes: super::CONSOLE_BYTES_MAX as u64,
            }),
            disks: disk_configs(&mut resources, disks.root, disks.config_drive),
            nets: net_configs(&mut resources, &view.ports, &rings)?,
            rng: None,
            balloon: None,
            vsock: None,
            control: Some(resources.add(prepared.control.into())),
            exit_record: Some(resources.add(prepared.exit.into())),
            lease: Some(resources.add(self.context().lease.reader()?)),
            sandbox: Sandbox::default(),
        };
        let spawned = self.context().spawner.spawn(&config, &resources.borrowed());
        let spawned = spawned.map_err(|error| Refused(error.to_string()))?;
        drop(resources);
        let process = Held::from_pidfd(spawned.pidfd);
        let watched = process.try_clone()?.into_pidfd();
        self.with_world(|world| {
            let life = Observation::Running(process, spawned.pid);
            world.guests.insert(id.clone(), Guest::new(record, life));
        });
        Ok(watched)
    }

    /// A packet ring for each port, known to the switch before the guest can send.
    fn make_rings(&self, view: &ServerView) -> Result<Vec<Region>> {
        let mut switch = self.switch()?;
        let make = |nic: &Nic| {
            let ring = Region::create()?;
            switch.attach(nic.port.as_str(), view.generation, &ring)?;
            self.with_world(|world| world.attached(nic.port.clone(), view.generation));
            Ok(ring)
        };
        view.ports.iter().map(make).collect()
    }
}

/// Descriptors of a spawn request, and their positions.
#[derive(Default)]
struct Descriptors {
    owned: Vec<OwnedFd>,
}

impl Descriptors {
    fn index(&mut self, descriptor: OwnedFd) -> usize {
        self.owned.push(descriptor);
        self.owned.len() - 1
    }

    fn add(&mut self, descriptor: OwnedFd) -> Resource {
        Resource::Descriptor(self.index(descriptor))
    }

    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.owned.iter().map(AsFd::as_fd).collect()
    }
}

fn disk_configs(
    resources: &mut Descriptors,
    root: OwnedFd,
    config_drive: Option<OwnedFd>,
) -> Vec<DiskConfig> {
    let mut disk = |id: &str, descriptor, read_only| DiskConfig {
        read_only,
        ..DiskConfig::new(id, DiskSource::Raw(resources.add(descriptor)), id)
    };
    let root = disk("root", root, false);
    let config_drive = config_drive.map(|descriptor| disk("config-drive", descriptor, true));
    std::iter::once(root).chain(config_drive).collect()
}

fn net_configs(
    resources: &mut Descriptors,
    nics: &[Nic],
    rings: &[Region],
) -> Result<Vec<NetConfig>> {
    let net = |(nic, ring): (&Nic, &Region)| {
        let ring = ring.descriptors()?.map(|descriptor| resources.index(descriptor));
        let backend = NetBackend::Ring(ring);
        Ok(NetConfig::new(&nic.port.to_string(), &nic.mac, nic.mtu, backend))
    };
    nics.iter().zip(rings).map(net).collect()
}
