//! What the agent observes, and which steps are under way.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use controller::api::SubState;
use controller::ids::{PortId, ServerId, VolumeId};
use controller::plan::observed::{self, GuestState, Observed};
use controller::plan::view::{HostView, SwitchView};
use tracing::{debug, warn};

use super::directory::{GuestDirectory, Life, Record};
use super::{GuestStatus, StageTime};
use crate::process::Held;

/// Prefix of a volume's disk id in a VMM.
const VOLUME_DISK: &str = "volume-";
/// A VMM that did not answer is asked again after this time: each question may take seconds.
const SILENT_PAUSE: Duration = Duration::from_secs(10);
/// From one start of a guest that resets itself to the next one, at least.
const RESET_PAUSE: Duration = Duration::from_secs(1);

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
    /// When it was started, or found.
    started: Instant,
    /// What its start took, where this agent started it.
    stages: Vec<StageTime>,
    /// When its VMM was last asked in vain.
    silent: Option<Instant>,
}

/// How a guest is, with what is needed to end it.
pub(super) enum Observation {
    Running(Held, u32),
    /// A process lives that does not say that it is this guest.
    Silent,
    Ended(String),
    Reset,
    Absent,
}

/// A guest to be looked at. Its VMM may take long to answer, so the world is not held meanwhile.
pub(super) struct Look {
    id: ServerId,
    directory: GuestDirectory,
    record: Record,
}

/// What was seen of a guest.
pub(super) struct Seen {
    id: ServerId,
    record: Record,
    life: std::io::Result<(Observation, Disks)>,
}

impl Look {
    /// Looks; blocks for a few seconds at most.
    pub(super) fn take(self) -> Seen {
        let life = observe(&self.directory, &self.record);
        Seen { id: self.id, record: self.record, life }
    }
}

/// What the agent observes.
pub(super) struct World {
    directory: PathBuf,
    pub(super) guests: BTreeMap<ServerId, Guest>,
    /// Directories without a record of their own, in which a process lives that is none of ours.
    strays: Vec<GuestDirectory>,
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
            strays: Vec::new(),
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
            let Some(record) = directory.own_record() else {
                // Where nothing runs, its start was cut off before anything did.
                match directory.remove_if_dead() {
                    Ok(true) => continue,
                    Ok(false) => warn!(?directory, "agent: a foreign process lives in it"),
                    Err(error) => {
                        warn!(?directory, %error, "agent: cannot remove what is none of ours")
                    }
                }
                world.strays.push(directory);
                continue;
            };
            let id = ServerId::from(record.server_id.clone());
            let guest = Guest::new(record.clone(), Observation::Absent);
            world.guests.insert(id.clone(), guest);
            world.saw(Look { id, directory, record }.take());
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

    /// How to look at one guest anew.
    pub(super) fn look_at(&self, id: &ServerId) -> Option<Look> {
        let guest = self.guests.get(id)?;
        let directory = GuestDirectory::of(&self.directory, id.as_str());
        // A guest that is being ended has a newer record on disk.
        let record = directory.record().unwrap_or_else(|| guest.record.clone());
        Some(Look { id: id.clone(), directory, record })
    }

    /// Takes over what was seen of a guest, where it wasn't started anew meanwhile.
    pub(super) fn saw(&mut self, seen: Seen) {
        let Seen { id, record, life } = seen;
        let Some(guest) = self.guests.get_mut(&id) else { return };
        if guest.record.nonce != record.nonce {
            return;
        }
        guest.record = record;
        match life {
            Ok((Observation::Silent, _)) => guest.is_silent(),
            Ok((life, disks)) => {
                guest.life = life;
                guest.saw(disks);
            }
            Err(error) => warn!(server_id = %id, %error, "agent: cannot look at a guest"),
        }
    }

    /// Servers whose guest runs or is being started.
    pub(super) fn live_guests(&self) -> Vec<ServerId> {
        let runs =
            |guest: &Guest| matches!(guest.life, Observation::Running(..) | Observation::Silent);
        let running = self.guests.iter().filter(|(_, guest)| runs(guest)).map(|(id, _)| id);
        running.chain(self.starting.keys()).cloned().collect()
    }

    /// Which guests are to be looked at anew: those whose process has ended, those with volumes, whose
    /// connections may be lost, and, less often, those that were silent.
    pub(super) fn looks_due(&self) -> Vec<Look> {
        let due = self.guests.iter().filter(|(_, guest)| {
            let asked_lately = guest.silent.is_some_and(|at| at.elapsed() < SILENT_PAUSE);
            match &guest.life {
                Observation::Running(held, _) if held.has_ended() => true,
                Observation::Running(..) => !guest.volumes.is_empty() && !asked_lately,
                Observation::Silent => !asked_lately,
                Observation::Ended(_) | Observation::Reset | Observation::Absent => false,
            }
        });
        due.filter_map(|(id, _)| self.look_at(id)).collect()
    }

    /// Removes what strays left where they have ended.
    pub(super) fn remove_strays(&mut self) {
        self.strays.retain(|directory| {
            // A guest may have been started there since.
            let ours = directory.own_record().is_some();
            !ours && !directory.remove_if_dead().unwrap_or(false)
        });
    }

    pub(super) fn saw_storage(&mut self, status: &storage::control::Status) {
        let volumes = status.volumes.iter().map(|volume| {
            let attached = volume.attached.as_ref();
            let holder = attached.map(|h| (ServerId::from(h.server_id.clone()), volume.generation));
            let host = attached.and_then(|holder| holder.host.clone());
            (VolumeId::from(volume.id.clone()), observed::Volume { holder, host })
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
        let (started, stages) = (Instant::now(), Vec::new());
        Guest { record, life, volumes, disconnected, started, stages, silent: None }
    }

    /// What was known of it stays: its process lives.
    fn is_silent(&mut self) {
        if self.silent.replace(Instant::now()).is_none() {
            let server_id = &self.record.server_id;
            warn!(%server_id, "agent: a guest's VMM does not answer, or is another's");
        }
        if !matches!(&self.life, Observation::Running(held, _) if !held.has_ended()) {
            self.life = Observation::Silent;
        }
    }

    fn saw(&mut self, disks: Disks) {
        self.silent = None;
        (self.volumes, self.disconnected) = (disks.volumes, disks.disconnected);
    }

    fn observed(&self) -> observed::Guest {
        observed::Guest {
            generation: self.record.generation,
            state: match &self.life {
                Observation::Running(..) | Observation::Silent => GuestState::Running,
                Observation::Ended(why) => GuestState::Ended(why.clone()),
                Observation::Reset => {
                    GuestState::Reset { rested: self.started.elapsed() >= RESET_PAUSE }
                }
                Observation::Absent => GuestState::Absent,
            },
            volumes: self.volumes.clone(),
            disconnected: self.disconnected.clone(),
        }
    }

    fn status(&self, id: &ServerId) -> GuestStatus {
        let (state, pid) = match &self.life {
            Observation::Running(_, pid) => ("running", Some(*pid)),
            Observation::Silent => ("silent", None),
            Observation::Ended(_) => ("ended", None),
            Observation::Reset => ("reset", None),
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
pub(super) struct Disks {
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
        Life::Silent(why) => {
            debug!(?directory, why, "agent: a VMM is silent");
            (Observation::Silent, Disks::default())
        }
        Life::Ended(why) => (Observation::Ended(why), Disks::default()),
        Life::Reset => (Observation::Reset, Disks::default()),
        Life::Absent => (Observation::Absent, Disks::default()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn record(server_id: &str) -> Record {
        Record {
            server_id: server_id.into(),
            generation: 1,
            nonce: "own".into(),
            boot_id: crate::process::boot_id(),
            ports: vec![],
            stopped: false,
        }
    }

    /// A VMM that answers one question with a nonce.
    fn answer(listener: UnixListener, nonce: &str) -> std::thread::JoinHandle<()> {
        let status = serde_json::json!({"status": {
            "id": "s", "nonce": nonce, "pid": std::process::id(), "state": "running",
            "disks": [], "disks_leaving": [], "nets": [],
            "timings": vmm::control::Timings::default(),
        }});
        std::thread::spawn(move || {
            let (socket, _) = listener.accept().expect("the agent connects");
            abi::control::receive(&socket).expect("a whole frame").expect("a question");
            let answer = status.to_string();
            abi::control::send(&socket, answer.as_bytes(), &[]).expect("it listens");
        })
    }

    #[test]
    fn a_silent_vmm_stops_nobody_and_is_taken_for_neither_ended_nor_another() {
        let guests = tempfile::tempdir().expect("a directory");
        let directory = |id| GuestDirectory::of(guests.path(), id);
        let _hung = directory("hung").prepare(&record("hung")).expect("prepared");
        let foreign = directory("foreign").prepare(&record("foreign")).expect("prepared");
        let asked = answer(foreign.control, "another's");

        let mut world = World::find(guests.path()).expect("the node starts");
        asked.join().expect("it was asked");
        for id in ["hung", "foreign"].map(ServerId::from) {
            let guest = &world.guests[&id];
            assert!(matches!(guest.life, Observation::Silent), "{id}");
            assert_eq!(guest.observed().state, GuestState::Running, "{id}");
        }
        assert!(world.looks_due().is_empty(), "they are asked again after a pause");

        // Once its process is gone, it is no longer silent.
        drop(foreign.exit);
        let look = world.look_at(&"foreign".into()).expect("it is known");
        world.saw(look.take());
        assert!(matches!(world.guests["foreign"].life, Observation::Ended(_)));
    }

    #[test]
    fn what_was_seen_of_a_process_is_not_taken_for_its_successor() {
        let guests = tempfile::tempdir().expect("a directory");
        let directory = GuestDirectory::of(guests.path(), "s");
        drop(directory.prepare(&record("s")).expect("prepared"));
        let mut world = World::find(guests.path()).expect("found");
        let seen = world.look_at(&"s".into()).expect("it is known").take();
        let newer = Record { nonce: "newer".into(), ..record("s") };
        world.guests.insert("s".into(), Guest::new(newer, Observation::Absent));
        world.saw(seen);
        assert!(matches!(world.guests["s"].life, Observation::Absent));
    }

    #[test]
    fn a_directory_that_a_process_holds_is_left_alone_whatever_its_record_says() {
        let guests = tempfile::tempdir().expect("a directory");
        let held = GuestDirectory::of(guests.path(), "held");
        let prepared = held.prepare(&record("another")).expect("prepared");
        GuestDirectory::of(guests.path(), "cut-off").prepare(&record("x")).map(drop).expect("made");
        let world = World::find(guests.path()).expect("found");
        assert!(world.guests.is_empty());
        let left = || std::fs::read_dir(guests.path()).expect("it is there").count();
        assert_eq!(left(), 1, "only what nobody holds is removed");
        drop(prepared);
        World::find(guests.path()).expect("found");
        assert_eq!(left(), 0);
    }
}
