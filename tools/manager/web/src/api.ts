/** Requests to the manager that serves this page. */

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    /** the field that is wrong, where one is */
    readonly param: string | null = null,
  ) {
    super(message);
  }
}

async function answer<T>(path: string, options: RequestInit): Promise<T> {
  let response: Response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if ((error as Error).name === "AbortError") throw error;
    throw new ApiError(0, "the manager does not answer / 管理器没有应答");
  }
  return readAnswer<T>(response);
}

export async function readAnswer<T>(response: Response): Promise<T> {
  const text = await response.text();
  let body: unknown = null;
  try {
    body = text ? JSON.parse(text) : null;
  } catch {
    // what is no JSON is shown as it is, below
  }
  if (response.ok) return body as T;
  throw errorOf(response.status, body, text || response.statusText);
}

function errorOf(status: number, body: unknown, text: string): ApiError {
  const found = (body ?? {}) as { error?: { message?: string; param?: string }; detail?: string };
  const message = found.error?.message ?? found.detail ?? text.slice(0, 300);
  return new ApiError(status, String(message), found.error?.param ?? null);
}

export const get = <T>(path: string, signal?: AbortSignal) => answer<T>(path, { signal });

export const post = <T>(path: string, body: unknown, signal?: AbortSignal) =>
  answer<T>(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });

export const remove = <T>(path: string) => answer<T>(path, { method: "DELETE" });

/** Query of an address; empty values are left out. */
export function query(values: Record<string, string | number | null | undefined>): string {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return "?" + new URLSearchParams(given.map(([key, value]) => [key, String(value)]));
}

/** Send a file; `onShare` hears which part of it has been sent (0 to 1), which fetch cannot say. */
export function upload<T>(path: string, file: File, onShare: (share: number) => void): Promise<T> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append("file", file, file.name);
    form.append("name", file.name);
    request.open("POST", path);
    request.upload.onprogress = (event) => onShare(event.loaded / Math.max(1, event.total));
    request.onerror = () => reject(new ApiError(0, "the upload broke off / 上传中断"));
    request.onload = () => {
      let body: unknown = null;
      try {
        body = JSON.parse(request.responseText);
      } catch {
        // see errorOf
      }
      const ok = request.status >= 200 && request.status < 300;
      if (ok) resolve(body as T);
      else reject(errorOf(request.status, body, request.responseText));
    };
    request.send(form);
  });
}
