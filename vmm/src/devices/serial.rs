//! COM1: a 16550A (the chip is vm-superio's) whose output goes where the console goes.
//!
//! Bytes are passed on a line at a time, or when the driver has said all it had (it then writes
//! the interrupt enable register): a file's two system calls for each byte would triple the time
//! of a boot.

use super::console::Sink;
use crate::machine::board::SERIAL_PIN;
use crate::machine::ioapic::IoApic;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

/// Bytes kept back at most.
const BUFFER_BYTES_MAX: usize = 1024;
const INTERRUPT_ENABLE: u8 = 1;

/// The port.
pub struct SerialPort {
    chip: Serial<Line, NoEvents, Output>,
}

struct Line(Arc<IoApic>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse(SERIAL_PIN);
        Ok(())
    }
}

struct Output {
    sink: Sink,
    buffer: Vec<u8>,
    /// Bytes passed on and not yet told.
    passed: usize,
}

impl Output {
    fn pass(&mut self) {
        if !self.buffer.is_empty() {
            self.sink.write(&self.buffer);
            self.passed += self.buffer.len();
            self.buffer.clear();
        }
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.buffer.len() >= BUFFER_BYTES_MAX {
            self.pass();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    /// A port on the I/O APIC's line, which writes to `sink`.
    pub fn new(ioapic: Arc<IoApic>, sink: Sink) -> SerialPort {
        let output = Output { sink, buffer: Vec::new(), passed: 0 };
        SerialPort { chip: Serial::new(Line(ioapic), output) }
    }

    /// A register is written; returns the number of bytes that were passed on.
    pub fn write(&mut self, register: u8, value: u8) -> usize {
        // The output can't fail (a sink that fails loses bytes), and the line neither.
        let _ = self.chip.write(register, value);
        if register == INTERRUPT_ENABLE {
            self.chip.writer_mut().pass();
        }
        std::mem::take(&mut self.chip.writer_mut().passed)
    }

    /// A register is read.
    pub fn read(&mut self, register: u8) -> u8 {
        self.chip.read(register)
    }

    /// Passes on what was kept back.
    pub fn flush(&mut self) -> usize {
        self.chip.writer_mut().pass();
        std::mem::take(&mut self.chip.writer_mut().passed)
    }
}
