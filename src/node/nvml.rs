//! The GPUs' facts from the driver's own library, loaded while we run: where it is not, nothing breaks.

use std::ffi::OsStr;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, EventSet, Nvml};

use super::gpus::{Gpu, Holder, Look, Sight, Xid};
use crate::sys::proc;

/// What drivers install; the name without a number comes with development files only.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Errors taken in at one look; a GPU that repeats one says no more by it.
const XIDS: usize = 64;

/// NVML, opened.
pub struct Session {
    /// Declared before what it borrows from, so that it is dropped first.
    events: Option<EventSet<'static>>,
    nvml: &'static Nvml,
    driver: String,
}

impl Session {
    /// The error is why there are no facts.
    pub fn open() -> Result<Self, String> {
        let nvml = match Nvml::builder().lib_path(OsStr::new(LIBRARY)).init() {
            Ok(nvml) => nvml,
            Err(NvmlError::LibloadingError(_)) => {
                return Err(format!("no NVIDIA driver here ({LIBRARY} is not found)"));
            }
            Err(error) => return Err(format!("NVML does not open: {error}")),
        };
        // For the process's life: what is handed out borrows from it, and a driver that was once
        // there is asked again and again.
        let nvml: &'static Nvml = Box::leak(Box::new(nvml));
        let driver = nvml.sys_driver_version().unwrap_or_default();
        Ok(Self { events: watch(nvml), nvml, driver })
    }

    pub fn look(&mut self) -> Look {
        let count = match self.nvml.device_count() {
            Ok(count) => count,
            Err(error) => return Look::Nothing(format!("NVML does not answer: {error}")),
        };
        let mut sight = Sight { driver: self.driver.clone(), ..Sight::default() };
        for index in 0..count {
            match self.nvml.device_by_index(index).and_then(|device| whole(index, &device)) {
                Ok(gpu) => sight.gpus.push(gpu),
                Err(error) => sight.lost.push(format!("GPU {index}: {error}")),
            }
        }
        sight.xids = self.xids();
        Look::Seen(sight)
    }

    fn xids(&self) -> Vec<Xid> {
        let Some(events) = &self.events else { return Vec::new() };
        let mut found = Vec::new();
        // Only what is there already: a time-out of 0 does not wait.
        while let Ok(event) = events.wait(0) {
            if let Some(error) = event.event_data {
                let number = match error {
                    nvml_wrapper::enums::event::XidError::Value(number) => number,
                    nvml_wrapper::enums::event::XidError::Unknown => 0,
                };
                found.push(Xid { number, gpu: event.device.uuid().unwrap_or_default() });
            }
            if found.len() == XIDS {
                break;
            }
        }
        found
    }
}

/// One GPU with its parts, where it is split.
fn whole(index: u32, device: &Device<'_>) -> Result<Gpu, NvmlError> {
    // Not split, or a driver that knows of no such thing: no parts. Places may be empty in between.
    let places = device.mig_device_count().unwrap_or(0);
    let part = |place| device.mig_device_by_index(place).and_then(|part| gpu(index, &part)).ok();
    let parts = (0..places).filter_map(part).collect();
    Ok(Gpu { parts, ..gpu(index, device)? })
}

fn gpu(index: u32, device: &Device<'_>) -> Result<Gpu, NvmlError> {
    let memory = device.memory_info()?;
    let mut holders: Vec<Holder> = Vec::new();
    // A refusal (MIG, permissions) means that nobody can be named.
    let lists = [device.running_compute_processes(), device.running_graphics_processes()];
    for process in lists.into_iter().flatten().flatten() {
        let Ok(pid) = i32::try_from(process.pid) else { continue };
        if holders.iter().any(|known| known.pid == pid) {
            continue;
        }
        let memory = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        holders.push(Holder { pid, memory, command: seen(pid) });
    }
    Ok(Gpu {
        index,
        uuid: device.uuid()?,
        name: device.name()?,
        memory_total: memory.total,
        memory_used: memory.used,
        holders,
        parts: Vec::new(),
    })
}

/// The command line, or at least the name; none where the process is not in our view of `/proc`.
fn seen(pid: i32) -> Option<String> {
    let line = proc::command_line(pid);
    if line.is_empty() { proc::stat(pid).map(|stat| stat.comm) } else { Some(line) }
}

/// Errors of all GPUs, where the driver reports them to us.
fn watch(nvml: &'static Nvml) -> Option<EventSet<'static>> {
    let mut events = nvml.create_event_set().ok()?;
    for index in 0..nvml.device_count().ok()? {
        // One that cannot gives the set back within the error; then the others are given up, too.
        if let Ok(device) = nvml.device_by_index(index) {
            events = device.register_events(EventTypes::CRITICAL_XID_ERROR, events).ok()?;
        }
    }
    Some(events)
}
