//! The gate of the volumes whose home is this host.
//!
//! One server holds a volume at a time, by generation. A generation never goes back:
//!
//! ```text
//!               attach or export, generation g, server s
//!   free at f ------------------------------------------> held by s at g        g >= f
//!             <------------------------------------------
//!               detach, generation >= g, server s
//!
//!   held by s at g: again by s at g → the same;  by t at g → in_use;  at less than g → stale
//!   held by s at g: by anyone at more than g → s is cut off, then held at the newer generation
//! ```
//!
//! An export is for one host, by the name in its certificate: the one that the grant names, or the
//! first that connects. Only a newer generation moves it.
//!
//! Cutting off an export closes its connection and waits for what it has in flight. A raw
//! descriptor can't be taken back, so each carries a shared `flock` of its own open file: the lock
//! lives exactly as long as any copy of the descriptor, in whatever process. A change of holder
//! needs that lock alone, and is refused until whoever has the descriptor has ended.

use crate::control::{
    Access, Attachment, Damaged, Error, ErrorKind, Holder, VolumeInfo, check_id, check_size,
};
use crate::directory::{self, Directory};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Most volumes with their home on one host.
pub(crate) const VOLUMES_MAX: usize = 10_000;
/// How long a connection that is cut off may take to end what it has in flight.
const CUT_OFF_MAX: Duration = Duration::from_secs(30);
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    id: String,
    size_bytes: u64,
    generation: u64,
    holder: Option<Holder>,
}

/// One volume. What changes it holds `gate` from the first check to the last sync; `state` is
/// held only to look or to note, so that a volume that is slow to cut off stops nobody else.
#[derive(Debug)]
struct Volume {
    gate: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    record: Record,
    session: Option<Session>,
    /// Deleted: whoever waited for the gate finds nothing behind it.
    gone: bool,
}

/// The gate's end of a connection from another host.
#[derive(Debug)]
struct Session {
    stop: watch::Sender<()>,
    ended: watch::Receiver<()>,
}

/// The connection's end: it stops when [`SessionGuard::stopped`] returns, finishes what it has in
/// flight and drops this.
#[derive(Debug)]
pub(crate) struct SessionGuard {
    stop: watch::Receiver<()>,
    _ended: watch::Sender<()>,
}

/// What a connection from another host is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExportName {
    pub(crate) volume_id: String,
    pub(crate) generation: u64,
    pub(crate) server_id: String,
}

/// An export that is open: the gate waits for `guard` to be dropped.
#[derive(Debug)]
pub(crate) struct OpenExport {
    pub(crate) file: File,
    pub(crate) size_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) guard: SessionGuard,
}

/// The volumes of one host.
#[derive(Debug)]
pub(crate) struct Volumes {
    directory: Arc<Directory>,
    runtime: Handle,
    volumes: Mutex<BTreeMap<String, Arc<Volume>>>,
    /// Volumes that can't be served, and why: by their directories' names.
    damaged: Mutex<BTreeMap<String, String>>,
    /// Held while a volume is made or removed, so that each happens once; after a gate, never
    /// before one.
    making: Mutex<()>,
}

/// What the gate's rules say to a claim.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The claimant holds it already.
    Keep,
    /// The claimant becomes the holder; whoever was is cut off first.
    Take,
    /// Nobody but the holder.
    InUse,
    /// The claim's time is over.
    Stale,
}

fn judge(record: &Record, claim: &Attachment, access: Access) -> Verdict {
    let same = |holder: &Holder| {
        holder.server_id == claim.server_id
            && holder.access == access
            && holder.read_only == claim.read_only
    };
    match &record.holder {
        _ if claim.generation < record.generation => Verdict::Stale,
        _ if claim.generation > record.generation => Verdict::Take,
        None => Verdict::Take,
        Some(holder) if same(holder) => Verdict::Keep,
        Some(_) => Verdict::InUse,
    }
}

impl ExportName {
    /// Reads `volume/<id>/<generation>/<server id>`.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("volume/")?.split('/');
        let (volume_id, generation, server_id) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || check_id("", volume_id).is_err() {
            return None;
        }
        check_id("", server_id).ok()?;
        Some(Self {
            volume_id: volume_id.to_owned(),
            generation: generation.parse().ok()?,
            server_id: server_id.to_owned(),
        })
    }
}

impl std::fmt::Display for ExportName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "volume/{}/{}/{}", self.volume_id, self.generation, self.server_id)
    }
}

impl Volumes {
    /// Reads what is there, with its holders. A damaged volume is left alone and named by every
    /// request for it; the others are served.
    pub(crate) fn open(directory: Arc<Directory>, runtime: Handle) -> io::Result<Self> {
        let (mut volumes, mut damaged) = (BTreeMap::new(), BTreeMap::new());
        for entry in fs::read_dir(directory.volumes())? {
            let path = entry?.path();
            match read_record(&path) {
                Ok(record) => {
                    volumes.insert(record.id.clone(), Arc::new(Volume::new(record)));
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "volume not served");
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    damaged.insert(name.into_owned(), error.to_string());
                }
            }
        }
        Ok(Self {
            directory,
            runtime,
            volumes: Mutex::new(volumes),
            damaged: Mutex::new(damaged),
            making: Mutex::new(()),
        })
    }

    /// Every volume, by id.
    pub(crate) fn list(&self) -> Vec<VolumeInfo> {
        lock(&self.volumes).values().map(|volume| volume.info()).collect()
    }

    /// Volumes that can't be served, by id.
    pub(crate) fn damaged(&self) -> Vec<Damaged> {
        let damaged = lock(&self.damaged);
        let entry = |(id, message): (&String, &String)| Damaged {
            id: id.clone(),
            message: message.clone(),
        };
        damaged.iter().map(entry).collect()
    }

    fn get(&self, volume_id: &str) -> Result<Arc<Volume>, Error> {
        if let Some(volume) = lock(&self.volumes).get(volume_id) {
            return Ok(Arc::clone(volume));
        }
        match lock(&self.damaged).get(volume_id) {
            None => Err(missing(volume_id)),
            Some(why) => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "volume {volume_id} is damaged at its home and not served: {why}; repair {} \
                     and restart the storage process, or delete the volume",
                    self.path(volume_id).display()
                ),
            )),
        }
    }

    /// Makes an empty volume.
    pub(crate) fn create(&self, volume_id: &str, size_bytes: u64) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        check_size("volume", size_bytes)?;
        let _making = lock(&self.making);
        let found = match self.get(volume_id) {
            Ok(volume) => Some(volume),
            Err(error) if error.kind == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if let Some(volume) = found {
            let found_bytes = lock(&volume.state).record.size_bytes;
            return if found_bytes == size_bytes {
                Ok(())
            } else {
                Err(Error::new(
                    ErrorKind::Exists,
                    format!("volume {volume_id} exists with {found_bytes} bytes"),
                ))
            };
        }
        if lock(&self.volumes).len() >= VOLUMES_MAX {
            return Err(Error::invalid(format!("this host has {VOLUMES_MAX} volumes, its limit")));
        }
        let record = Record {
            version: VERSION,
            id: volume_id.to_owned(),
            size_bytes,
            generation: 0,
            holder: None,
        };
        self.make(&record)
            .map_err(|error| Error::io(format_args!("make volume {volume_id}"), error))?;
        lock(&self.volumes).insert(volume_id.to_owned(), Arc::new(Volume::new(record)));
        Ok(())
    }

    fn make(&self, record: &Record) -> io::Result<()> {
        let staging = self.directory.staging("volume");
        directory::make(staging.path())?;
        let data = directory::create_new(&staging.path().join("data"))?;
        data.set_len(record.size_bytes)?;
        data.sync_all()?;
        let mut file = directory::create_new(&staging.path().join("volume.json"))?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        directory::sync(staging.path())?;
        let place = self.path(&record.id);
        fs::rename(staging.path(), &place)?;
        directory::sync_parent(&place)
    }

    /// Removes a volume that nobody holds, or that is held at an older generation.
    pub(crate) fn delete(&self, volume_id: &str, generation: Option<u64>) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        let Ok(volume) = self.get(volume_id) else {
            return self.delete_damaged(volume_id);
        };
        let _gate = lock(&volume.gate);
        let Ok(record) = volume.record(volume_id) else {
            return Ok(());
        };
        let newer = generation.is_some_and(|generation| generation > record.generation);
        if let (Some(holder), false) = (&record.holder, newer) {
            return Err(held(volume_id, holder, record.generation));
        }
        self.cut_off(&volume, volume_id)?;
        let _making = lock(&self.making);
        self.directory.remove(&self.path(volume_id))?;
        lock(&volume.state).gone = true;
        lock(&self.volumes).remove(volume_id);
        Ok(())
    }

    /// Nobody holds what is not served, but a descriptor handed out before may still be open.
    fn delete_damaged(&self, volume_id: &str) -> Result<(), Error> {
        let _making = lock(&self.making);
        if !lock(&self.damaged).contains_key(volume_id) {
            return Ok(());
        }
        if self.data(volume_id).exists() {
            self.check_closed(volume_id)?;
        }
        self.directory.remove(&self.path(volume_id))?;
        lock(&self.damaged).remove(volume_id);
        Ok(())
    }

    /// Makes a server the holder, durably, and opens the volume for it.
    pub(crate) fn attach(&self, claim: &Attachment) -> Result<(File, u64), Error> {
        let volume = self.get(&claim.volume_id)?;
        let _gate = lock(&volume.gate);
        let size_bytes = self.claim(&volume, claim, Access::Local, None)?;
        let file = self.open_data(&claim.volume_id, claim.read_only)?;
        Ok((file, size_bytes))
    }

    /// Makes a server on another host (that one, where it is named) the holder, durably; the
    /// volume's size.
    pub(crate) fn export(&self, claim: &Attachment, host: Option<&str>) -> Result<u64, Error> {
        let volume = self.get(&claim.volume_id)?;
        let _gate = lock(&volume.gate);
        self.claim(&volume, claim, Access::Export, host)
    }

    /// With the gate held: the volume's size, where the claim is now the holder's.
    fn claim(
        &self,
        volume: &Volume,
        claim: &Attachment,
        access: Access,
        host: Option<&str>,
    ) -> Result<u64, Error> {
        let id = &claim.volume_id;
        check_id("server", &claim.server_id)?;
        let record = volume.record(id)?;
        match (judge(&record, claim, access), &record.holder) {
            (Verdict::Keep, Some(holder)) => {
                let size_bytes = record.size_bytes;
                if let Some(host) = host {
                    self.bind(volume, &record, holder, host)?;
                }
                return Ok(size_bytes);
            }
            (Verdict::Take, _) => {}
            (Verdict::InUse, Some(holder)) => return Err(held(id, holder, record.generation)),
            (Verdict::Stale | Verdict::InUse | Verdict::Keep, None) | (Verdict::Stale, Some(_)) => {
                return Err(stale(id, claim.generation, record.generation));
            }
        }
        self.cut_off(volume, id)?;
        self.check_closed(id)?;
        let holder = Holder {
            server_id: claim.server_id.clone(),
            access,
            read_only: claim.read_only,
            host: host.map(str::to_owned),
        };
        let size_bytes = record.size_bytes;
        self.write(
            volume,
            Record { generation: claim.generation, holder: Some(holder), ..record },
        )?;
        Ok(size_bytes)
    }

    /// With the gate held: an export is for one host. Where none is noted yet this one is, durably.
    fn bind(
        &self,
        volume: &Volume,
        record: &Record,
        holder: &Holder,
        host: &str,
    ) -> Result<(), Error> {
        match &holder.host {
            Some(bound) if bound == host => Ok(()),
            Some(bound) => Err(Error::in_use(format!(
                "volume {} is exported to {bound} at generation {}, not to {host}",
                record.id, record.generation
            ))),
            None => {
                let holder = Holder { host: Some(host.to_owned()), ..holder.clone() };
                self.write(volume, Record { holder: Some(holder), ..record.clone() })
            }
        }
    }

    /// Ends an attachment, unless a newer one has taken its place.
    pub(crate) fn detach(
        &self,
        volume_id: &str,
        server_id: &str,
        generation: u64,
    ) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        check_id("server", server_id)?;
        let Ok(volume) = self.get(volume_id) else {
            return Ok(());
        };
        let _gate = lock(&volume.gate);
        let Ok(record) = volume.record(volume_id) else {
            return Ok(());
        };
        let holds = record.holder.as_ref().is_some_and(|holder| holder.server_id == server_id);
        if !holds || generation < record.generation {
            return Ok(());
        }
        self.cut_off(&volume, volume_id)?;
        self.write(&volume, Record { generation, holder: None, ..record })
    }

    /// What a connection from another host would open: its size and whether it may only read.
    pub(crate) fn look_up(&self, name: &ExportName) -> Result<(u64, bool), Error> {
        let record = self.get(&name.volume_id)?.record(&name.volume_id)?;
        Ok((record.size_bytes, admit(&record, name)?))
    }

    /// Opens a volume for a connection from another host. An earlier connection of the same
    /// attachment is cut off first, with all it had in flight: its peer may have lost it without
    /// our knowing, and asks again what was not answered.
    pub(crate) fn connect(&self, name: &ExportName, host: &str) -> Result<OpenExport, Error> {
        let volume = self.get(&name.volume_id)?;
        let _gate = lock(&volume.gate);
        let record = volume.record(&name.volume_id)?;
        let read_only = admit(&record, name)?;
        if let Some(holder) = &record.holder {
            self.bind(&volume, &record, holder, host)?;
        }
        self.cut_off(&volume, &name.volume_id)?;
        let file = self.open_data(&name.volume_id, read_only)?;
        let (stop, stopped) = watch::channel(());
        let (ending, ended) = watch::channel(());
        lock(&volume.state).session = Some(Session { stop, ended });
        let guard = SessionGuard { stop: stopped, _ended: ending };
        Ok(OpenExport { file, size_bytes: record.size_bytes, read_only, guard })
    }

    /// With the gate held: closes the volume's connection, if any, and waits until it touches the
    /// volume no more.
    fn cut_off(&self, volume: &Volume, volume_id: &str) -> Result<(), Error> {
        let Some((stop, mut ended)) = lock(&volume.state)
            .session
            .as_ref()
            .map(|session| (session.stop.clone(), session.ended.clone()))
        else {
            return Ok(());
        };
        stop.send_replace(());
        // The only message is the end: `changed` fails when the connection drops its half.
        let waited = self
            .runtime
            .block_on(async { tokio::time::timeout(CUT_OFF_MAX, ended.changed()).await });
        if waited.is_err() {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "volume {volume_id}: its connection did not end within {} seconds",
                    CUT_OFF_MAX.as_secs()
                ),
            ));
        }
        lock(&volume.state).session = None;
        Ok(())
    }

    /// Refuses while any copy of a descriptor that was handed out is open.
    fn check_closed(&self, volume_id: &str) -> Result<(), Error> {
        let path = self.data(volume_id);
        let failed = |error| Error::io(format_args!("lock {}", path.display()), error);
        let data = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        match flock(&data, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::in_use(format!(
                "volume {volume_id}: a descriptor of it is still open in a guest's process"
            ))),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn open_data(&self, volume_id: &str, read_only: bool) -> Result<File, Error> {
        let path = self.data(volume_id);
        let failed = |error| Error::io(format_args!("open {}", path.display()), error);
        let data = OpenOptions::new().read(true).write(!read_only).open(&path).map_err(failed)?;
        flock(&data, FlockOperation::NonBlockingLockShared)
            .map_err(|error| failed(error.into()))?;
        Ok(data)
    }

    /// With the gate held: notes a volume's new state on disk, then in memory.
    fn write(&self, volume: &Volume, record: Record) -> Result<(), Error> {
        let path = self.path(&record.id).join("volume.json");
        serde_json::to_vec_pretty(&record)
            .map_err(io::Error::from)
            .and_then(|bytes| self.directory.write(&path, &bytes))
            .map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
        lock(&volume.state).record = record;
        Ok(())
    }

    fn path(&self, volume_id: &str) -> PathBuf {
        self.directory.volumes().join(volume_id)
    }

    fn data(&self, volume_id: &str) -> PathBuf {
        self.path(volume_id).join("data")
    }
}

impl Volume {
    fn new(record: Record) -> Self {
        Self {
            gate: Mutex::new(()),
            state: Mutex::new(State { record, session: None, gone: false }),
        }
    }

    fn record(&self, volume_id: &str) -> Result<Record, Error> {
        let state = lock(&self.state);
        if state.gone { Err(missing(volume_id)) } else { Ok(state.record.clone()) }
    }

    fn info(&self) -> VolumeInfo {
        let state = lock(&self.state);
        let connected = |session: &Session| session.ended.has_changed().is_ok();
        VolumeInfo {
            id: state.record.id.clone(),
            size_bytes: state.record.size_bytes,
            generation: state.record.generation,
            attached: state.record.holder.clone(),
            connected: state.session.as_ref().is_some_and(connected),
        }
    }
}

/// Whether a connection may only read; an error where it is not the holder's.
fn admit(record: &Record, name: &ExportName) -> Result<bool, Error> {
    if name.generation < record.generation {
        return Err(stale(&name.volume_id, name.generation, record.generation));
    }
    match &record.holder {
        Some(holder)
            if holder.access == Access::Export
                && holder.server_id == name.server_id
                && name.generation == record.generation =>
        {
            Ok(holder.read_only)
        }
        _ => Err(Error::in_use(format!(
            "volume {} is not exported to server {} at generation {}",
            name.volume_id, name.server_id, name.generation
        ))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SessionGuard {
    /// Returns when the gate cuts the connection off.
    pub(crate) async fn stopped(&mut self) {
        // An error means that the gate itself is gone: the end as well.
        let _ = self.stop.changed().await;
    }
}

fn read_record(path: &Path) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(path.join("volume.json"))?)?;
    let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidData, message));
    if record.version != VERSION {
        return invalid(format!("version {}; this program reads {VERSION}", record.version));
    }
    if path.file_name() != Some(record.id.as_ref()) {
        return invalid(format!("its record names volume {:?}", record.id));
    }
    let found_bytes = fs::metadata(path.join("data"))?.len();
    if found_bytes != record.size_bytes {
        return invalid(format!("{found_bytes} bytes; its record says {}", record.size_bytes));
    }
    Ok(record)
}

fn missing(volume_id: &str) -> Error {
    Error::not_found(format!("volume {volume_id} does not have its home here"))
}

fn held(volume_id: &str, holder: &Holder, generation: u64) -> Error {
    Error::in_use(format!(
        "volume {volume_id} is held by server {} at generation {generation}",
        holder.server_id
    ))
}

fn stale(volume_id: &str, generation: u64, newest: u64) -> Error {
    Error::new(
        ErrorKind::Stale,
        format!("volume {volume_id}: generation {generation} is older than {newest}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64, holder: Option<(&str, Access)>) -> Record {
        let holder = holder.map(|(server_id, access)| Holder {
            server_id: server_id.to_owned(),
            access,
            read_only: false,
            host: None,
        });
        Record { version: VERSION, id: "v".to_owned(), size_bytes: 512, generation, holder }
    }

    fn claim(server_id: &str, generation: u64) -> Attachment {
        Attachment {
            volume_id: "v".to_owned(),
            server_id: server_id.to_owned(),
            generation,
            read_only: false,
        }
    }

    #[test]
    fn the_gate_admits_one_holder_and_never_an_older_generation() {
        let free = record(3, None);
        let held = record(3, Some(("a", Access::Local)));
        let check = |record: &Record, server, generation, access, expected| {
            assert_eq!(judge(record, &claim(server, generation), access), expected);
        };
        check(&free, "a", 2, Access::Local, Verdict::Stale);
        check(&free, "a", 3, Access::Local, Verdict::Take);
        check(&free, "a", 4, Access::Export, Verdict::Take);
        check(&held, "a", 3, Access::Local, Verdict::Keep);
        check(&held, "a", 3, Access::Export, Verdict::InUse);
        check(&held, "b", 3, Access::Local, Verdict::InUse);
        check(&held, "b", 4, Access::Local, Verdict::Take);
        check(&held, "a", 2, Access::Local, Verdict::Stale);
    }

    #[test]
    fn export_names_are_read_strictly() {
        let name =
            ExportName { volume_id: "v-1".to_owned(), generation: 7, server_id: "s-1".to_owned() };
        assert_eq!(ExportName::parse(&name.to_string()), Some(name));
        for wrong in
            ["", "volume/", "volume/v/1", "volume/v/1/s/x", "volume/../1/s", "volume/v/-1/s"]
        {
            assert_eq!(ExportName::parse(wrong), None, "{wrong}");
        }
    }
}
