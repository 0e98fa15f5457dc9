//! What the agent observes, and which steps are under way.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use controller::api::SubState;
use controller::ids::{PortId, ServerId, VolumeId};
use controller::plan::Step;
use controller::plan::observed::{self, GuestState, Observed};
use controller::plan::view::{HostView, SwitchView};
use tracing::warn;

use super::directory::{GuestDirectory, Life, Record};
use super::{GuestStatus, RETRY_FIRST, RETRY_LAST, StageTime};
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
    volumes: Option<BTreeMap<VolumeId, observed::Volume>>,
    images: BTreeSet<String>,
    images_known: BTreeSet<String>,
    switch_instance: Option<String>,
    programmed: Option<SwitchView>,
    attached: BTreeMap<PortId, u64>,
    rejected: Vec<netstack::control::RejectedPort>,
    busy: BTreeSet<String>,
    failed: BTreeMap<String, Failure>,
    /// Guests that are being started.
    pub(super) starting: BTreeMap<ServerId, SubState>,
    /// Number of the last program.
    pub(super) revision: u64,
}

struct Failure {
    count: u32,
    again: Instant,
}

impl World {
    /// Finds the guests by their directories.
    pub(super) fn find(guests: &Path) -> Result<World> {
        let mut world = World {
            directory: guests.to_owned(),
            guests: BTreeMap::new(),
            volumes: None,
            images: BTreeSet::new(),
            images_known: BTreeSet::new(),
            switch_instance: None,
            programmed: None,
            attached: BTreeMap::new(),
            rejected: Vec::new(),
            busy: BTreeSet::new(),
            failed: BTreeMap::new(),
            starting: BTreeMap::new(),
            revision: 0,
        };
        for directory in GuestDirectory::all(guests)? {
            let Some(record) = directory.record() else {
                // Its start was cut off before anything ran.
                directory.remove()?;
                continue;
            };
            let id = ServerId(record.server_id.clone());
            let (life, volumes) = observe(&directory, &record)?;
            world.guests.insert(id, Guest { record, life, volumes, stages: Vec::new() });
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
            Ok((life, volumes)) => (guest.life, guest.volumes) = (life, volumes),
            Err(error) => warn!(server_id = %id, %error, "agent: cannot look at a guest"),
        }
    }

    /// Looks anew at guests whose process has ended.
    pub(super) fn refresh_guests(&mut self) {
        let ended = self.guests.iter().filter(|(_, guest)| match &guest.life {
            Observation::Running(held, _) => held.has_ended(),
            _ => false,
        });
        for id in ended.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.refresh_guest(&id);
        }
    }

    pub(super) fn saw_storage(&mut self, status: &storage::control::Status) {
        let volumes = status.volumes.iter().map(|volume| {
            let holder = volume.attached.as_ref();
            let holder = holder.map(|h| (ServerId(h.server_id.clone()), volume.generation));
            (VolumeId(volume.id.clone()), observed::Volume { holder })
        });
        self.volumes = Some(volumes.collect());
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
            attached.map(|port| (PortId(port.port_id.clone()), port.generation)).collect();
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

    /// Takes a step if nothing is under way on its subject and no retry is pending.
    pub(super) fn take(&mut self, step: &Step) -> bool {
        let subject = step.subject();
        let waits = self.failed.get(&subject).is_some_and(|f| f.again > Instant::now());
        !waits && self.busy.insert(subject)
    }

    /// A step has ended.
    pub(super) fn done(&mut self, step: &Step, ok: bool) {
        let subject = step.subject();
        self.busy.remove(&subject);
        if ok {
            self.failed.remove(&subject);
            return;
        }
        let count = self.failures(step);
        let pause = RETRY_FIRST.saturating_mul(1 << count.min(10)).min(RETRY_LAST);
        self.failed.insert(subject, Failure { count: count + 1, again: Instant::now() + pause });
    }

    /// How often steps on this subject have failed in a row.
    pub(super) fn failures(&self, step: &Step) -> u32 {
        self.failed.get(&step.subject()).map_or(0, |failure| failure.count)
    }

    /// Until the next retry is due.
    pub(super) fn next_retry(&self) -> Option<Duration> {
        let now = Instant::now();
        let due = self.failed.values().map(|f| f.again).filter(|again| *again > now);
        due.min().map(|again| again - now)
    }
}

impl Guest {
    pub(super) fn new(record: Record, life: Observation) -> Guest {
        Guest { record, life, volumes: BTreeSet::new(), stages: Vec::new() }
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

fn observe(
    directory: &GuestDirectory,
    record: &Record,
) -> std::io::Result<(Observation, BTreeSet<VolumeId>)> {
    Ok(match directory.life(record)? {
        Life::Running(status, process) => {
            let disks = status.disks.iter().filter_map(|disk| disk.strip_prefix(VOLUME_DISK));
            (Observation::Running(process, status.pid), disks.map(VolumeId::from).collect())
        }
        Life::Ended(why) => (Observation::Ended(why), BTreeSet::new()),
        Life::Absent => (Observation::Absent, BTreeSet::new()),
    })
}
