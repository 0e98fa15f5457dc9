//! What the agent observes, and which steps are under way.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use controller::api::SubState;
use controller::ids::{PortId, ServerId, VolumeId};
use controller::plan::observed::{self, GuestState, Observed};
use controller::plan::view::{HostView, SwitchView};
use tracing::warn;

use super::directory::{GuestDirectory, Life, Record};
use super::{GuestStatus, StageTime};
use crate::process::Held;

/// Prefix of a volume's disk id in a VMM.
const VOLUME_DISK: &str = "volume-";

/// The id that a volume has as a disk of a VMM.
pub(super) fn disk_id(volume: &VolumeId) -> String {
    format!("{VOLUME_DISK}{volume}")
}

/// A guest of this host.
pub(super) struct Guest {
    pub(super) record: Record,
    pub(super) life: Observation,
    pub(super) volumes: BTreeSet<VolumeId>,
    /// Those whose connection to another host is lost.
    disconnected: BTreeSet<VolumeId>,
    /// What its start took, where this agent started it.
    stages: Vec<StageTime>,
}

/// How a guest is, with what is needed to end it.
pub(super) enum Observation {
    Running(Held, u32),
    Ended(String),
    Absent,
}

/// What the agent observes.
pub(super) struct World {
    directory: PathBuf,
    pub(super) guests: BTreeMap<ServerId, Guest>,
    roots: BTreeSet<ServerId>,
    volumes: Option<BTreeMap<VolumeId, observed::Volume>>,
    images: BTreeSet<String>,
    images_known: BTreeSet<String>,
    switch_instance: Option<String>,
    programmed: Option<SwitchView>,
    attached: BTreeMap<PortId, u64>,
    rejected: Vec<netstack::control::RejectedPort>,
    /// Guests that are being started.
    pub(super) starting: BTreeMap<ServerId, SubState>,
    /// Number of the last program.
    pub(super) revision: u64,
}

impl World {
    /// Finds the guests by their directories.
    pub(super) fn find(guests: &Path) -> Result<World> {
        let mut world = World {
            directory: guests.to_owned(),
            guests: BTreeMap::new(),
            roots: BTreeSet::new(),
            volumes: None,
            images: BTreeSet::new(),
            images_known: BTreeSet::new(),
            switch_instance: None,
            programmed: None,
            attached: BTreeMap::new(),
            rejected: Vec::new(),
            starting: BTreeMap::new(),
            revision: 0,
        };
        for directory in GuestDirectory::all(guests)? {
            let Some(record) = directory.record() else {
                // Its start was cut off before anything ran.
                directory.remove()?;
                continue;
            };
            let id = ServerId::from(record.server_id.clone());
            let (life, disks) = observe(&directory, &record)?;
            let mut guest = Guest::new(record, life);
            guest.saw(disks);
            world.guests.insert(id, guest);
        }
        Ok(world)
    }

    /// What `plan` needs; `None` before storage and switch were seen.
    pub(super) fn observed(&mut self, view: &HostView) -> Option<Observed> {
        self.switch_instance.as_ref()?;
        let volumes = self.volumes.clone()?;
        self.images_known.extend(view.images.iter().cloned());
        let guests = self.guests.iter().map(|(id, guest)| (id.clone(), guest.observed()));
        Some(Observed {
            guests: guests.collect(),
            roots: self.roots.clone(),
            volumes,
            // Content that was never in the catalog may be an upload that is not yet committed.
            images: self.images.intersection(&self.images_known).cloned().collect(),
            switch: observed::Switch {
                programmed: self.programmed.as_ref() == Some(&view.switch),
                attached: self.attached.clone(),
            },
        })
    }

    /// A guest was started; each stage took that long.
    pub(super) fn started(&mut self, id: &ServerId, stages: &[(SubState, Duration)]) {
        let Some(guest) = self.guests.get_mut(id) else { return };
        let stage = |(stage, took): &(SubState, Duration)| StageTime {
            stage: stage.as_str().into(),
            ms: took.as_secs_f64() * 1e3,
        };
        guest.stages = stages.iter().map(stage).collect();
    }

    pub(super) fn guest_statuses(&self) -> Vec<GuestStatus> {
        self.guests.iter().map(|(id, guest)| guest.status(id)).collect()
    }

    pub(super) fn running_pidfds(&self) -> Vec<(ServerId, OwnedFd)> {
        let running = self.guests.iter().filter_map(|(id, guest)| match &guest.life {
            Observation::Running(held, _) => {
                Some((id.clone(), held.pidfd().as_fd().try_clone_to_owned().ok()?))
            }
            _ => None,
        });
        running.collect()
    }

    /// Looks at one guest anew.
    pub(super) fn refresh_guest(&mut self, id: &ServerId) {
        let Some(guest) = self.guests.get_mut(id) else { return };
        let directory = GuestDirectory::of(&self.directory, id.as_str());
        // A guest that is being ended has a newer record on disk.
        if let Some(record) = directory.record() {
            guest.record = record;
        }
        match observe(&directory, &guest.record) {
            Ok((life, disks)) => {
                guest.life = life;
                guest.saw(disks);
            }
            Err(error) => warn!(server_id = %id, %error, "agent: cannot look at a guest"),
        }
    }

    /// Servers whose guest runs or is being started.
    pub(super) fn live_guests(&self) -> Vec<ServerId> {
        let runs = |guest: &Guest| matches!(guest.life, Observation::Running(..));
        let running = self.guests.iter().filter(|(_, guest)| runs(guest)).map(|(id, _)| id);
        running.chain(self.starting.keys()).cloned().collect()
    }

    /// Looks anew at guests whose process has ended, and at those with volumes, whose connections
    /// may be lost.
    pub(super) fn refresh_guests(&mut self) {
        let ended = self.guests.iter().filter(|(_, guest)| match &guest.life {
            Observation::Running(held, _) => held.has_ended() || !guest.volumes.is_empty(),
            _ => false,
        });
        for id in ended.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.refresh_guest(&id);
        }
    }

    pub(super) fn saw_storage(&mut self, status: &storage::control::Status) {
        let volumes = status.volumes.iter().map(|volume| {
            let holder = volume.attached.as_ref();
            let holder = holder.map(|h| (ServerId::from(h.server_id.clone()), volume.generation));
            (VolumeId::from(volume.id.clone()), observed::Volume { holder })
        });
        self.volumes = Some(volumes.collect());
        self.roots = status.servers.iter().map(|id| ServerId::from(id.clone())).collect();
        self.images = status.images.iter().map(|image| image.sha512.clone()).collect();
    }

    pub(super) fn saw_switch(&mut self, status: &netstack::control::Status) {
        if self.switch_instance.as_ref() != Some(&status.instance) {
            self.switch_instance = Some(status.instance.clone());
            self.programmed = None;
        }
        if self.rejected != status.ports_rejected {
            for port in &status.ports_rejected {
                warn!(port = port.port_id, reason = port.message, "switch: a port is left out");
            }
            self.rejected = status.ports_rejected.clone();
        }
        let attached = status.ports_attached.iter();
        self.attached =
            attached.map(|port| (PortId::from(port.port_id.clone()), port.generation)).collect();
    }

    pub(super) fn programmed(&mut self, view: SwitchView) {
        self.programmed = Some(view);
    }

    pub(super) fn is_programmed(&self, view: &SwitchView) -> bool {
        self.programmed.as_ref() == Some(view)
    }

    pub(super) fn attached(&mut self, port: PortId, generation: u64) {
        self.attached.insert(port, generation);
    }

    pub(super) fn detached(&mut self, port: &PortId) {
        self.attached.remove(port);
    }

    pub(super) fn root_is(&mut self, id: &ServerId, there: bool) {
        match there {
            true => self.roots.insert(id.clone()),
            false => self.roots.remove(id),
        };
    }

    pub(super) fn volume_is(&mut self, id: &VolumeId, volume: Option<observed::Volume>) {
        let volumes = self.volumes.get_or_insert_default();
        match volume {
            Some(volume) => volumes.insert(id.clone(), volume),
            None => volumes.remove(id),
        };
    }

    pub(super) fn image_removed(&mut self, content: &str) {
        self.images.remove(content);
        self.images_known.remove(content);
    }
}

impl Guest {
    pub(super) fn new(record: Record, life: Observation) -> Guest {
        let (volumes, disconnected) = Default::default();
        Guest { record, life, volumes, disconnected, stages: Vec::new() }
    }

    fn saw(&mut self, disks: Disks) {
        (self.volumes, self.disconnected) = (disks.volumes, disks.disconnected);
    }

    fn observed(&self) -> observed::Guest {
        observed::Guest {
            generation: self.record.generation,
            state: match &self.life {
                Observation::Running(..) => GuestState::Running,
                Observation::Ended(why) => GuestState::Ended(why.clone()),
                Observation::Absent => GuestState::Absent,
            },
            volumes: self.volumes.clone(),
            disconnected: self.disconnected.clone(),
        }
    }

    fn status(&self, id: &ServerId) -> GuestStatus {
        let (state, pid) = match &self.life {
            Observation::Running(_, pid) => ("running", Some(*pid)),
            Observation::Ended(_) => ("ended", None),
            Observation::Absent => ("absent", None),
        };
        GuestStatus {
            id: id.to_string(),
            state: state.into(),
            pid,
            generation: self.record.generation,
            volumes: self.volumes.iter().map(ToString::to_string).collect(),
            stages: self.stages.clone(),
        }
    }
}

/// Volumes of a guest as its VMM tells of them.
#[derive(Default)]
struct Disks {
    volumes: BTreeSet<VolumeId>,
    disconnected: BTreeSet<VolumeId>,
}

fn observe(directory: &GuestDirectory, record: &Record) -> std::io::Result<(Observation, Disks)> {
    let volumes = |disks: &[String]| {
        let volumes = disks.iter().filter_map(|disk| disk.strip_prefix(VOLUME_DISK));
        volumes.map(VolumeId::from).collect()
    };
    Ok(match directory.life(record)? {
        Life::Running(status, process) => {
            let disks = Disks {
                volumes: volumes(&status.disks),
                disconnected: volumes(&status.disks_disconnected),
            };
            (Observation::Running(process, status.pid), disks)
        }
        Life::Ended(why) => (Observation::Ended(why), Disks::default()),
        Life::Absent => (Observation::Absent, Disks::default()),
    })
}
