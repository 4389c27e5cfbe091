// The procedural world, one thread a pixel: the fast form of engine.recipes.world.render_reference.
//
// engine.recipes.world prepends one `#define P_NAME offset` per field of its parameter table, so the layout has one home.
// Compiled by NVRTC (no standard headers there), by nvcc, and by g++ (tests: `render_host` runs the same code on a CPU).
// Every number here has its twin in world.py; tests/engine/recipes/test_world.py holds the two together.

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FN __device__ __forceinline__
#else
#include <math.h>
#define FN static inline
#endif

#define BOUND 1.28f        // radius of a sphere about any unit object
#define PENUMBRA 0.45f     // how far beyond it a soft shadow may reach, in object units
#define HIT 0.002f
#define MARCH_STEPS 40
#define SHADOW_STEPS 24
#define FAR 400.0f

struct V3 { float x, y, z; };

FN V3 vec(float x, float y, float z) { V3 v; v.x = x; v.y = y; v.z = z; return v; }
FN V3 load(const float* p) { return vec(p[0], p[1], p[2]); }
FN V3 operator+(V3 a, V3 b) { return vec(a.x + b.x, a.y + b.y, a.z + b.z); }
FN V3 operator-(V3 a, V3 b) { return vec(a.x - b.x, a.y - b.y, a.z - b.z); }
FN V3 operator*(V3 a, V3 b) { return vec(a.x * b.x, a.y * b.y, a.z * b.z); }
FN V3 operator*(V3 a, float s) { return vec(a.x * s, a.y * s, a.z * s); }
FN float dot(V3 a, V3 b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
FN V3 mix(V3 a, V3 b, float s) { return a + (b - a) * s; }
FN float mix(float a, float b, float s) { return a + (b - a) * s; }
FN V3 unit(V3 a) { return a * (1.0f / sqrtf(dot(a, a))); }
FN float clamp(float x, float lo, float hi) { return fminf(fmaxf(x, lo), hi); }
FN float smooth(float lo, float hi, float x) {
    float s = clamp((x - lo) / (hi - lo), 0.0f, 1.0f);
    return s * s * (3.0f - 2.0f * s);
}
FN float square(float x) { return x * x; }

// ---------------------------------------------------------------- noise

FN float hash(int x, int y) {
    unsigned h = (unsigned)x * 374761393u + (unsigned)y * 668265263u;
    h = (h ^ (h >> 13)) * 1274126177u;
    return (float)((h ^ (h >> 16)) >> 8) * (1.0f / 16777216.0f);
}

FN float noise(float x, float y) {
    float fx = floorf(x), fy = floorf(y);
    int ix = (int)fx, iy = (int)fy;
    float u = x - fx, v = y - fy;
    u = u * u * (3.0f - 2.0f * u);
    v = v * v * (3.0f - 2.0f * v);
    float lower = mix(hash(ix, iy), hash(ix + 1, iy), u);
    float upper = mix(hash(ix, iy + 1), hash(ix + 1, iy + 1), u);
    return mix(lower, upper, v);
}

// ---------------------------------------------------------------- objects

FN float box(float x, float y, float z, float hx, float hy, float hz) {
    float a = fabsf(x) - hx, b = fabsf(y) - hy, c = fabsf(z) - hz;
    float pa = fmaxf(a, 0.0f), pb = fmaxf(b, 0.0f), pc = fmaxf(c, 0.0f);
    return sqrtf(pa * pa + pb * pb + pc * pc) + fminf(fmaxf(a, fmaxf(b, c)), 0.0f);
}

// Weights are the same for a whole frame, so these branches never diverge inside a warp.
FN float shape(const float* w, V3 q) {
    float d = 0.0f;
    float radius = sqrtf(q.x * q.x + q.z * q.z);
    if (w[0] > 0.0f) d += w[0] * (sqrtf(dot(q, q)) - 0.95f);
    if (w[1] > 0.0f) d += w[1] * (box(q.x, q.y, q.z, 0.72f, 0.72f, 0.72f) - 0.04f);
    if (w[2] > 0.0f) {
        float a = radius - 0.68f, b = fabsf(q.y) - 0.86f;
        float pa = fmaxf(a, 0.0f), pb = fmaxf(b, 0.0f);
        d += w[2] * (sqrtf(pa * pa + pb * pb) + fminf(fmaxf(a, b), 0.0f) - 0.03f);
    }
    if (w[3] > 0.0f) d += w[3] * fmaxf(0.8944f * radius + 0.4472f * (q.y - 1.05f), -0.85f - q.y);
    if (w[4] > 0.0f) {
        float y = 0.95534f * q.y - 0.29552f * q.z, z = 0.29552f * q.y + 0.95534f * q.z;
        float a = sqrtf(q.x * q.x + y * y) - 0.70f;
        d += w[4] * (sqrtf(a * a + z * z) - 0.26f);
    }
    if (w[5] > 0.0f) d += w[5] * (fabsf(q.x) + 0.85f * fabsf(q.y) + fabsf(q.z) - 1.0f) * 0.60257f;
    if (w[6] > 0.0f) {
        float a = box(q.x, q.y, q.z, 0.92f, 0.26f, 0.26f), b = box(q.x, q.y, q.z, 0.26f, 0.92f, 0.26f);
        d += w[6] * (fminf(fminf(a, b), box(q.x, q.y, q.z, 0.26f, 0.26f, 0.92f)) - 0.03f);
    }
    return d;
}

FN V3 turn(const float* o, V3 d) {  // world direction -> object direction
    return vec(o[O_COS] * d.x - o[O_SIN] * d.z, d.y, o[O_SIN] * d.x + o[O_COS] * d.z);
}
FN V3 place(const float* o, V3 p) { return turn(o, (p - load(o + O_CENTRE)) * (1.0f / o[O_SCALE])); }

// Distance along the ray to the object, or `limit` when it is missed.
FN float march(const float* o, V3 origin, V3 ray, float limit) {
    float scale = o[O_SCALE];
    if (scale < 0.01f) return limit;
    V3 p = place(o, origin), d = turn(o, ray);
    float b = dot(p, d);
    float disc = b * b - dot(p, p) + BOUND * BOUND;
    if (disc <= 0.0f) return limit;
    disc = sqrtf(disc);
    float t = fmaxf(-b - disc, 0.0f), end = fminf(disc - b, limit / scale);
#pragma unroll 1
    for (int i = 0; i < MARCH_STEPS && t < end; ++i) {
        float step = shape(o + O_SHAPE, p + d * t);
        if (step < HIT) return t * scale;
        t += step;
    }
    return limit;
}

// Share of the key light that arrives: 1 is free, 0 is hidden behind the object.
FN float shadow(const float* o, V3 origin, V3 light) {
    if (o[O_SCALE] < 0.01f) return 1.0f;
    V3 p = place(o, origin), d = turn(o, light);
    float b = dot(p, d);
    float disc = b * b - dot(p, p) + square(BOUND + PENUMBRA);
    if (disc <= 0.0f) return 1.0f;
    disc = sqrtf(disc);
    float t = fmaxf(-b - disc, 0.03f), end = disc - b, open = 1.0f;
#pragma unroll 1
    for (int i = 0; i < SHADOW_STEPS && t < end; ++i) {
        float step = shape(o + O_SHAPE, p + d * t);
        open = fminf(open, 9.0f * step / t);
        if (open < 0.005f) return 0.0f;
        t += clamp(step, 0.05f, 0.35f);
    }
    open = clamp(open, 0.0f, 1.0f);
    return open * open * (3.0f - 2.0f * open);
}

// Ambient light left at a ground point by the nearness of an object.
FN float contact(const float* o, V3 p) {
    if (o[O_SCALE] < 0.01f) return 1.0f;
    V3 q = place(o, p);
    if (dot(q, q) > square(BOUND + 0.6f)) return 1.0f;
    return 1.0f - 0.6f * square(1.0f - clamp(shape(o + O_SHAPE, q) / 0.6f, 0.0f, 1.0f));
}

FN float shadows(const float* P, V3 p, V3 light) {
    float open = 1.0f;
#pragma unroll 1
    for (int j = 0; j < 3; ++j) open = fminf(open, shadow(P + P_OBJECTS + j * O_SIZE, p, light));
    return open;
}

// ---------------------------------------------------------------- sky

FN V3 gradient(const float* P, float height) {
    float s = 1.0f - clamp(height * 2.2f, 0.0f, 1.0f);
    return mix(load(P + P_ZENITH), load(P + P_HORIZON), s * s);
}

FN V3 sky(const float* P, V3 d) {
    V3 c = gradient(P, d.y);
    const float* w = P + P_SKY;
    float depth = 1.0f / fmaxf(-d.z, 0.2f);
    float u = d.x * depth, v = fmaxf(d.y * depth, 0.0f);
    float rise = smooth(0.0f, 0.12f, v);  // the horizon itself keeps the colour of the haze
    float cloudy = w[0] + w[3];
    if (cloudy > 0.0f) {
        float n = 0.65f * noise(u * 5.0f + 40.3f, v * 12.0f + 7.1f) + 0.35f * noise(u * 11.0f + 3.7f, v * 25.0f + 90.2f);
        c = mix(c, vec(0.93f, 0.95f, 0.98f), w[0] * rise * 0.85f * smooth(0.48f, 0.72f, n));
        c = c * (1.0f + w[3] * rise * (0.9f * n - 0.5f));
    }
    if (w[1] > 0.0f) {
        float r = sqrtf(square(u + 0.26f) + square(v - 0.13f));
        c = c + vec(0.75f, 0.30f, 0.06f) * (w[1] * 0.8f * rise * expf(-9.0f * r * r));
        c = mix(c, vec(1.0f, 0.86f, 0.50f), w[1] * smooth(0.075f, 0.060f, r));
    }
    float starry = w[2] + 0.6f * w[4];
    if (starry > 0.0f) {
        float x = u * 13.0f + 50.0f, y = v * 13.0f + 20.0f;
        float fx = floorf(x), fy = floorf(y);
        int ix = (int)fx, iy = (int)fy;
        float a = x - fx - 0.25f - 0.5f * hash(ix, iy), b = y - fy - 0.25f - 0.5f * hash(ix + 31, iy);
        float bright = fmaxf(hash(ix, iy + 57) - 0.55f, 0.0f) * 1.6f;
        c = c + vec(0.9f, 0.95f, 1.0f) * (starry * bright * expf(-90.0f * (a * a + b * b)));
    }
    if (w[2] > 0.0f) {
        float r = sqrtf(square(u - 0.30f) + square(v - 0.21f));
        c = c + vec(0.10f, 0.13f, 0.20f) * (w[2] * rise * expf(-30.0f * r * r));
        c = mix(c, vec(0.93f, 0.92f, 0.82f), w[2] * smooth(0.070f, 0.056f, r));
    }
    if (w[4] > 0.0f) {
        float a = P[P_AURORA], b = P[P_AURORA + 1];
        float base = 0.09f + 0.035f * sinf(u * 5.0f + a) + 0.02f * sinf(u * 9.0f - b);
        float up = v - base;
        float curtain = smooth(-0.03f, 0.03f, up) * expf(-8.0f * fmaxf(up, 0.0f));
        curtain *= 0.65f + 0.35f * sinf(u * 17.0f + 2.0f * sinf(u * 4.0f + b) + 0.5f * a);
        V3 glow = mix(vec(0.10f, 0.85f, 0.38f), vec(0.50f, 0.12f, 0.62f), clamp(up * 4.5f, 0.0f, 1.0f));
        c = c + glow * (w[4] * curtain);
    }
    return c;
}

// ---------------------------------------------------------------- ground

FN float fade(float footprint, float cell) { return 1.0f / (1.0f + square(3.0f * footprint / cell)); }

FN V3 ground(const float* P, V3 origin, V3 ray, float t, float pixel) {
    t = fminf(t, FAR);
    V3 p = vec(origin.x + ray.x * t, 0.0f, origin.z + ray.z * t);
    V3 light = load(P + P_LIGHT);
    // A texture's cell fades before it is smaller than a few pixels: nothing here flickers.
    float footprint = t * pixel / fmaxf(-ray.y, 0.02f);
    float x = P[P_TURF] * p.x - P[P_TURF + 1] * p.z + P[P_TURF + 2];
    float z = P[P_TURF + 1] * p.x + P[P_TURF] * p.z + P[P_TURF + 3];
    const float* w = P + P_GROUND;
    V3 solid = vec(0.0f, 0.0f, 0.0f);
    if (w[0] > 0.0f) {
        float n = noise(x * 0.9f, z * 0.9f), m = noise(x * 2.6f + 9.0f, z * 2.6f) - 0.5f;
        V3 c = mix(vec(0.10f, 0.22f, 0.035f), vec(0.22f, 0.34f, 0.06f), mix(0.5f, n, fade(footprint, 1.1f)));
        solid = solid + c * (w[0] * (1.0f + 0.7f * m * fade(footprint, 0.38f)));
    }
    if (w[1] > 0.0f) {
        float n = noise(x * 0.55f, z * 0.55f) - 0.5f;
        float wave = sinf(z * 5.5f + x * 1.6f + 6.0f * n) * fade(footprint, 1.1f);
        solid = solid + vec(0.66f, 0.45f, 0.21f) * (w[1] * (1.0f + 0.20f * wave + 0.25f * n * fade(footprint, 1.8f)));
    }
    if (w[2] > 0.0f) {
        float n = noise(x * 0.5f + 3.0f, z * 0.5f), m = noise(x * 1.3f, z * 1.3f + 5.0f) - 0.5f;
        V3 c = mix(vec(0.44f, 0.55f, 0.76f), vec(0.76f, 0.82f, 0.91f), mix(0.5f, smooth(0.25f, 0.75f, n), fade(footprint, 2.0f)));
        solid = solid + c * (w[2] * (1.0f + 0.16f * m * fade(footprint, 0.77f)));
    }
    if (w[3] > 0.0f) {
        float sharp = 0.28f / footprint;
        float a = clamp(sinf(x * 2.618f) * sharp, -1.0f, 1.0f), b = clamp(sinf(z * 2.618f) * sharp, -1.0f, 1.0f);
        solid = solid + mix(vec(0.085f, 0.095f, 0.12f), vec(0.62f, 0.60f, 0.56f), 0.5f + 0.5f * a * b) * w[3];
    }

    float open = shadows(P, p, light), near = 1.0f;
#pragma unroll 1
    for (int j = 0; j < 3; ++j) near *= contact(P + P_OBJECTS + j * O_SIZE, p);
    open = 1.0f - P[P_SHADE] * (1.0f - open);
    V3 c = solid * (load(P + P_GROUND_KEY) * (light.y * open) + load(P + P_GROUND_AMBIENT) * near);

    if (w[4] > 0.0f) {
        const float* f = P + P_WAVES;
        float a = cosf(2.1f * x + 1.2f * z + f[0]), b = cosf(-1.5f * x + 2.7f * z + f[1]);
        float d = cosf(4.6f * x + 2.0f * z + f[2]), e = cosf(-3.1f * x + 5.2f * z + f[3]);
        float slow = fade(footprint, 1.6f), fast = fade(footprint, 0.9f);
        float nx = 0.055f * slow * (2.1f * a - 1.5f * b) * 0.45f + 0.012f * fast * (4.6f * d - 3.1f * e) * 0.45f;
        float nz = 0.055f * slow * (1.2f * a + 2.7f * b) * 0.45f + 0.012f * fast * (2.0f * d + 5.2f * e) * 0.45f;
        V3 n = unit(vec(-nx, 1.0f, -nz));
        float facing = fmaxf(-dot(ray, n), 0.0f);
        V3 mirror = ray + n * (2.0f * facing);
        mirror.y = fabsf(mirror.y);
        float fresnel = 0.10f + 0.75f * square(square(1.0f - facing));
        V3 deep = vec(0.016f, 0.13f, 0.22f) * (load(P + P_GROUND_KEY) + load(P + P_GROUND_AMBIENT));
        V3 wet = mix(deep, gradient(P, mirror.y), fresnel);
        float glint = fmaxf(dot(mirror, vec(-light.x, light.y, -light.z)), 0.0f);
        glint = square(square(square(glint)));
        wet = wet + load(P + P_GROUND_KEY) * (0.25f * glint);
        c = c + wet * (w[4] * (0.45f + 0.55f * open) * (0.4f + 0.6f * near));
    }
    return mix(load(P + P_HORIZON), c, expf(-square(t * (1.0f / 32.0f))));
}

// ---------------------------------------------------------------- light on an object

FN V3 surface(const float* P, const float* o, bool hero, V3 origin, V3 ray, float t) {
    V3 p = origin + ray * t, q = place(o, p), light = load(P + P_LIGHT);
    const float* w = o + O_SHAPE;
    const float e = 0.004f;
    float a = shape(w, q + vec(e, -e, -e)), b = shape(w, q + vec(-e, -e, e));
    float c = shape(w, q + vec(-e, e, -e)), d = shape(w, q + vec(e, e, e));
    V3 m = unit(vec(a - b - c + d, c + d - a - b, b + d - a - c));
    V3 n = vec(o[O_COS] * m.x + o[O_SIN] * m.z, m.y, o[O_COS] * m.z - o[O_SIN] * m.x);

    V3 base = load(o + O_COLOUR);
    if (hero && P[P_STRIPED] > 0.0f) {
        float band = sinf((0.42f * q.x + 0.86f * q.y + 0.28f * q.z) * 8.0f + 0.6f);
        base = mix(base, load(P + P_STRIPE), P[P_STRIPED] * clamp(0.5f + 4.0f * band, 0.0f, 1.0f));
    }
    base = base * (1.0f - 0.42f * clamp(0.5f - q.x * 60.0f, 0.0f, 1.0f));

    float lambert = dot(n, light);
    float open = lambert > 0.0f ? shadows(P, p + n * 0.03f, light) : 0.0f;
    open = 1.0f - P[P_SHADE] * (1.0f - open);
    float corner = 1.0f - 0.45f * clamp(1.0f - p.y * 2.0f, 0.0f, 1.0f) * (0.6f - 0.4f * n.y);
    V3 key = load(P + P_KEY);
    V3 ambient = mix(load(P + P_AMBIENT_LOW), load(P + P_AMBIENT_HIGH), 0.5f + 0.5f * n.y) * corner;
    V3 arriving = key * (0.72f * fmaxf(lambert, 0.0f) * open + 0.32f * square(0.5f + 0.5f * lambert)) + ambient;
    V3 colour = base * arriving;

    float facing = clamp(-dot(n, ray), 0.0f, 1.0f);
    float edge = square(1.0f - facing);
    if (hero && P[P_METAL] > 0.0f) {
        // Faces bulge a little: a flat mirror shows one colour and could not be told from matte.
        V3 bulge = unit(m + q * 0.45f);
        bulge = vec(o[O_COS] * bulge.x + o[O_SIN] * bulge.z, bulge.y, o[O_COS] * bulge.z - o[O_SIN] * bulge.x);
        V3 mirror = ray - bulge * (2.0f * dot(bulge, ray));
        // Chrome as painters do it: brightest above a dark horizon, and two lamps that sweep over a turning face.
        // Hardly tinted, so that gold stays gold by day.
        float lamp = smooth(0.22f, 0.08f, fabsf(fabsf(mirror.x) - 0.42f));
        V3 above = (gradient(P, mirror.y) * 0.6f + load(P + P_AMBIENT_HIGH) + key * 0.35f)
                 * (1.0f + 0.9f * lamp - 0.6f * clamp(mirror.y * 1.4f, 0.0f, 1.0f));
        V3 below = (load(P + P_BOUNCE) * 0.5f + load(P + P_AMBIENT_HIGH) + key * 0.25f)
                 * (0.08f + 0.45f * clamp(mirror.y * -1.3f, 0.0f, 1.0f));
        V3 world = mix(below, above, smooth(-0.04f, 0.04f, mirror.y));
        float grey = (0.3f * world.x + 0.55f * world.y + 0.15f * world.z) * 0.75f;
        world = world * 0.25f + vec(grey, grey, grey);
        float shine = fmaxf(dot(mirror, light), 0.0f);
        shine = square(square(square(square(square(shine)))));
        V3 tint = base * 0.95f + vec(0.04f, 0.04f, 0.04f);
        V3 metal = tint * (world * 1.2f + arriving * 0.12f) * corner + world * (0.30f * edge * edge);
        metal = metal + (tint * 0.7f + vec(0.25f, 0.25f, 0.25f)) * key * (1.7f * shine * open);
        colour = mix(colour, metal, P[P_METAL]);
    }
    return colour + load(P + P_RIM) * (edge * (1.0f - facing) * (0.6f + 0.4f * n.y));
}

// ---------------------------------------------------------------- a pixel

// Colour, display-referred 0..255, seen through the point (x, y) of the picture, each from -1 to 1 and y upward.
FN V3 trace(const float* P, float x, float y, float pixel) {
    V3 origin = load(P + P_EYE);
    V3 ray = unit(load(P + P_RIGHT) * x + load(P + P_UP) * y + load(P + P_FORWARD));
    float t = ray.y < -1e-4f ? -origin.y / ray.y : 1e9f;
    bool below = t < 1e9f;
    int seen = -1;
#pragma unroll 1
    for (int j = 0; j < 3; ++j) {
        float hit = march(P + P_OBJECTS + j * O_SIZE, origin, ray, t);
        if (hit < t) { t = hit; seen = j; }
    }
    V3 c;
    if (seen >= 0) c = surface(P, P + P_OBJECTS + seen * O_SIZE, seen == 0, origin, ray, t);
    else if (below) c = ground(P, origin, ray, t, pixel);
    else c = sky(P, ray);
    // Square root: the display's transfer curve, near enough, and exact in every compiler.
    return vec(sqrtf(clamp(c.x, 0.0f, 1.0f)), sqrtf(clamp(c.y, 0.0f, 1.0f)), sqrtf(clamp(c.z, 0.0f, 1.0f))) * 255.0f;
}

FN void shade_pixel(const float* P, unsigned char* out, int column, int row, int size) {
    float step = 1.0f / (float)size;
    V3 sum = vec(0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
        float x = (2 * column + (k & 1)) * step + 0.5f * step - 1.0f;
        float y = 1.0f - (2 * row + (k >> 1)) * step - 0.5f * step;
        sum = sum + trace(P, x, y, 2.0f * step / FOCAL);
    }
    long long plane = (long long)size * size, at = (long long)row * size + column;
    out[at] = (unsigned char)(sum.x * 0.25f + 0.5f);
    out[plane + at] = (unsigned char)(sum.y * 0.25f + 0.5f);
    out[2 * plane + at] = (unsigned char)(sum.z * 0.25f + 0.5f);
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// Grid: (frames, tiles of 16 x 16 pixels). Block: 256 threads, a warp to 8 x 4 pixels so that its rays stay together.
extern "C" __global__ void __launch_bounds__(256, 3)
render_frames(const float* __restrict__ params, unsigned char* __restrict__ out, int size) {
    __shared__ float P[P_COUNT];
    for (int i = threadIdx.x; i < P_COUNT; i += 256) P[i] = params[(long long)blockIdx.x * P_COUNT + i];
    __syncthreads();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, across = (size + 15) / 16;
    int column = (blockIdx.y % across) * 16 + (warp & 1) * 8 + (lane & 7);
    int row = (blockIdx.y / across) * 16 + (warp >> 1) * 4 + (lane >> 3);
    if (column < size && row < size)
        shade_pixel(P, out + (long long)blockIdx.x * 3 * size * size, column, row, size);
}
#else
extern "C" void render_host(const float* params, unsigned char* out, int frames, int size) {
    for (int f = 0; f < frames; ++f)
        for (int row = 0; row < size; ++row)
            for (int column = 0; column < size; ++column)
                shade_pixel(params + (long long)f * P_COUNT, out + (long long)f * 3 * size * size, column, row, size);
}
#endif
