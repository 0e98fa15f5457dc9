//! A host's switch: its program and its ports, each attached with a generation.

use std::collections::BTreeMap;

use controller::ids::PortId;
use controller::plan::view::SwitchView;

/// A switch; a new process comes up empty.
#[derive(Clone, Debug)]
pub(crate) struct Switch {
    /// Whether its process lives.
    pub(crate) up: bool,
    /// Names its process.
    pub(crate) instance: u64,
    /// What it does.
    pub(crate) program: Option<SwitchView>,
    /// Attached ports and their generations.
    pub(crate) attached: BTreeMap<PortId, u64>,
}

impl Switch {
    /// A process that has just come up.
    pub(crate) fn new(instance: u64) -> Switch {
        Switch { up: true, instance, program: None, attached: BTreeMap::new() }
    }

    /// Its process ends.
    pub(crate) fn stop(&mut self) {
        self.up = false;
        self.program = None;
        self.attached.clear();
    }

    fn answering(&self) -> Result<(), String> {
        if self.up { Ok(()) } else { Err("the switch does not answer".into()) }
    }

    /// Takes a program whole.
    pub(crate) fn program(&mut self, view: &SwitchView) -> Result<(), String> {
        self.answering()?;
        self.program = Some(view.clone());
        Ok(())
    }

    /// Attaches a port; an older generation is refused, a newer one replaces.
    pub(crate) fn attach(&mut self, port: &PortId, generation: u64) -> Result<(), String> {
        self.answering()?;
        match self.attached.get(port) {
            Some(held) if *held > generation => Err(format!("port {port}: an older generation")),
            _ => {
                self.attached.insert(port.clone(), generation);
                Ok(())
            }
        }
    }

    /// Lets go of a port, unless a newer generation has it.
    pub(crate) fn detach(&mut self, port: &PortId, generation: u64) -> Result<(), String> {
        self.answering()?;
        if self.attached.get(port).is_some_and(|held| *held <= generation) {
            self.attached.remove(port);
        }
        Ok(())
    }
}
