//! What a host is made of, simulated: storage, switch, guests and the lease page. Nothing here
//! decides anything: it does what the agent's steps ask for, or refuses as the real parts do.

pub(crate) mod guest;
pub(crate) mod storage;
pub(crate) mod switch;

use std::collections::BTreeMap;
use std::time::Duration;

use controller::ids::{ServerId, VolumeId};
use controller::plan::observed::{self, Observed};

use guest::Guest;
use storage::Storage;
use switch::Switch;

/// One machine. It outlives its node's process, and its disks outlive its power.
#[derive(Debug)]
pub(crate) struct Hardware {
    /// When its clock since boot stood at nothing, on the simulation's clock.
    pub(crate) booted: Duration,
    /// How often it was started.
    pub(crate) boots: u64,
    /// Whether it is on.
    pub(crate) powered: bool,
    /// The gate of its volumes; its records are durable.
    pub(crate) storage: Storage,
    /// The switch; it forgets all when it ends.
    pub(crate) switch: Switch,
    /// Guests with a directory here.
    pub(crate) guests: BTreeMap<ServerId, Guest>,
    /// Until when guests' writes pass, on this host's clock since boot.
    pub(crate) writes_until: Duration,
    /// Percent of steps that fail.
    pub(crate) failing: u64,
    /// Percent of steps that hang for a while.
    pub(crate) hanging: u64,
}

impl Hardware {
    /// A machine that was just put up, with an image.
    pub(crate) fn new(now: Duration, image: Option<&str>) -> Hardware {
        Hardware {
            booted: now,
            boots: 1,
            powered: true,
            storage: Storage::new(image),
            switch: Switch::new(0),
            guests: BTreeMap::new(),
            writes_until: Duration::ZERO,
            failing: 0,
            hanging: 0,
        }
    }

    /// Its clock since boot.
    pub(crate) fn clock(&self, now: Duration) -> Duration {
        now.saturating_sub(self.booted)
    }

    /// Whether its guests' writes pass now.
    pub(crate) fn may_write(&self, now: Duration) -> bool {
        self.clock(now) < self.writes_until
    }

    /// Power is cut: every process ends, and what only memory held is gone.
    pub(crate) fn power_off(&mut self) {
        self.powered = false;
        self.storage.stop();
        self.switch.stop();
        self.writes_until = Duration::ZERO;
        for guest in self.guests.values_mut() {
            guest.lost_with_host();
        }
        for id in self.guests.keys().cloned().collect::<Vec<_>>() {
            self.storage.descriptors_closed(&id);
        }
    }

    /// Power is back: storage and switch run again, guests don't.
    pub(crate) fn power_on(&mut self, now: Duration) {
        self.powered = true;
        self.booted = now;
        self.boots += 1;
        self.storage.start();
        self.switch = Switch::new(self.switch.instance + 1);
    }

    /// Ends a guest's process, leaving why in its exit record.
    pub(crate) fn end_guest(&mut self, id: &ServerId, why: &str) {
        if let Some(guest) = self.guests.get_mut(id) {
            guest.end(why);
            self.storage.descriptors_closed(id);
        }
    }

    /// What the agent sees, where storage and switch answer. `programmed` says whether the
    /// switch's program is the wanted one.
    pub(crate) fn observe(&self, programmed: bool) -> Observed {
        let guests = self
            .guests
            .iter()
            .map(|(id, guest)| (id.clone(), guest.observed(self.storage.instance)));
        Observed {
            guests: guests.collect(),
            roots: self.storage.roots.clone(),
            volumes: self.storage.observed(),
            images: self.storage.images.clone(),
            switch: observed::Switch { programmed, attached: self.switch.attached.clone() },
        }
    }

    /// The servers whose guests' processes live here.
    pub(crate) fn running(&self) -> Vec<ServerId> {
        self.guests.keys().filter(|id| self.runs(id)).cloned().collect()
    }

    /// Whether a guest's process lives here.
    pub(crate) fn runs(&self, id: &ServerId) -> bool {
        self.guests.get(id).is_some_and(|guest| guest.process.is_some())
    }

    /// The disk of a running guest.
    pub(crate) fn has_disk(&self, id: &ServerId, volume: &VolumeId) -> bool {
        let process = self.guests.get(id).and_then(|guest| guest.process.as_ref());
        process.is_some_and(|process| process.disks.contains_key(volume))
    }
}
